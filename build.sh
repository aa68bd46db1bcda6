#!/bin/sh
# build.sh - builds, tests and packages tcpproxy
#
#   ./build.sh                  build out/tcpproxy: on Linux one static file that needs no other
#   ./build.sh try              the same, then send a line through it: client -> tcpproxy -> its built-in echo server
#   ./build.sh run ARGS         run it, built first if the sources are newer
#   ./build.sh test [FILTER...] run the tests, or those with a FILTER in their class or method name
#   ./build.sh check            formatting, every analyzer, trim and AOT warnings: all clean or it fails
#   ./build.sh bench ARGS       run the benchmarks
#   ./build.sh fuzz SECONDS     run each fuzz test for SECONDS
#   ./build.sh dist             out/dist: for each target that this machine can make a binary and a package (binary, systemd
#                               unit, sample configuration, README, licence), and an OCI image of the Linux ones
#   ./build.sh clean            remove all that was built
#   ./build.sh help             this text
#
#   TCPPROXY_LINK=dynamic       build out/tcpproxy-dynamic instead, which uses the system's C library
#   TCPPROXY_LINK=portable      build out/portable/tcpproxy instead, which needs the .NET runtime; test it without any call
#                               into the C library, as it runs on Windows and macOS (TCPPROXY_PORTABLE=1)
#   SOURCE_DATE_EPOCH=SECONDS   dist: the time that packages and images bear (the last commit's)
#   TCPPROXY_BIN=FILE           test, bench, fuzz: use FILE instead of building one
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
out=$root/out
obj=$out/obj # intermediate files, a folder for each kind of build so that none disturbs another
linux=$([ "$(uname -s)" != Linux ] || echo yes)
export DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_NOLOGO=1

say() { printf '%s\n' "$*" >&2; }
die() { say "build.sh: error: $*"; exit 1; }
usage() { say "build.sh: error: $*; ./build.sh help lists the words"; exit 2; }
have() { command -v "$1" >/dev/null 2>&1; }

# -- what this machine has ----------------------------------------------------------------------------------------

# The one command that installs a thing, by its package names on Debian, Fedora and Alpine.
install() {
    if have apt-get; then echo "apt-get install -y $1"
    elif have dnf; then echo "dnf install -y $2"
    elif have apk; then echo "apk add $3"
    else echo "install $1"
    fi
}

need_sdk() {
    if ! have dotnet && [ -x "${HOME-}/.dotnet/dotnet" ]; then PATH=$PATH:$HOME/.dotnet; fi # dotnet-install.sh's place
    version=$(cd "$root" && dotnet --version 2>/dev/null) || version=none
    if [ "${version%%.*}" -ge 10 ] 2>/dev/null; then return; fi
    hint=$(install dotnet-sdk-10.0 dotnet-sdk-10.0 dotnet10-sdk)
    case $hint in # Debian itself has no .NET; Ubuntu has
        apt-get*) [ -n "$(apt-cache show dotnet-sdk-10.0 2>/dev/null)" ] || hint= ;;
        install*) hint= ;;
    esac
    die ".NET SDK 10 is needed (found: $version): ${hint:-curl -sSL https://dot.net/v1/dotnet-install.sh | bash -s -- --channel 10.0}"
}

# Whether this compiler command links a program.
links() { echo 'int main(void) { return 0; }' | "$@" -x c - -o "$obj/probe" 2>/dev/null; }

# Sets compiler, linker, kind (static-pie, static or dynamic) and props, which tells MSBuild.
find_toolchain() { # static|dynamic
    mkdir -p "$obj"
    kind=$1
    if [ -z "$linux" ]; then
        compiler=clang linker=ld props=
        links clang || die "no compiler to link with: xcode-select --install"
        return
    fi
    for pair in 'clang lld' 'gcc lld' 'clang bfd' 'gcc bfd' none; do
        compiler=${pair% *} linker=${pair#* }
        if links "$compiler" "-fuse-ld=$linker"; then break; fi
    done
    [ "$pair" != none ] || die "no compiler to link with: $(install 'clang lld' 'clang lld glibc-static' 'clang lld build-base')"
    props="-p:CppCompilerAndLinker=$compiler -p:LinkerFlavor=$linker"
    [ "$kind" = static ] || return 0
    links "$compiler" "-fuse-ld=$linker" -static ||
        die "no static C library: $(install libc6-dev glibc-static musl-dev), or TCPPROXY_LINK=dynamic ./build.sh"
    props="$props -p:StaticExecutable=true"
    # GNU ld (seen up to 2.40) fails on an assertion when it makes a static-pie of the runtime's objects.
    if [ "$linker" = lld ] && links "$compiler" -fuse-ld=lld -static-pie && { "$obj/probe"; } 2>/dev/null; then
        kind=static-pie
        # glibc before 2.36 would start without having adjusted anything: the probe crashes.
        if links "$compiler" -fuse-ld=lld -static-pie -Wl,--pack-dyn-relocs=relr && { "$obj/probe"; } 2>/dev/null; then
            props="$props -p:PackRelocations=true"
        fi
    else
        props="$props -p:PositionIndependentExecutable=false"
    fi
}

# -- building -----------------------------------------------------------------------------------------------------

# Two builds at once would write the same files: the second waits. Called in subshells; dotnet's servers, which live on, get no copy.
lock() {
    mkdir -p "$obj"
    exec 9>"$obj/lock"
    if have flock; then flock 9; fi
}

sdk() { # FOLDER DOTNET-COMMAND...: its files go below out/obj/FOLDER; only warnings and errors are shown
    folder=$obj/$1; shift
    (cd "$root" && ArtifactsPath=$folder dotnet "$@" -nologo -v:quiet) >&2 9>&-
}

# Publishes a binary to FILE, whole or not at all. From nothing every time: the SDK's own incremental native build does
# not notice that a setting has changed, and would save a second. Warnings are for check: the new rules of a newer SDK do
# not stop who only wants the binary.
publish() { # FILE PROPERTIES...
    file=$1; shift
    rm -rf "$obj/publish"
    sdk publish publish TcpProxy.csproj -c Release -o "$obj/publish/to" -p:RunAnalyzers=false -p:TreatWarningsAsErrors=false "$@" || die "${file#"$root/"} could not be built"
    cp "$obj/publish/to/tcpproxy" "$file.new"
    mv -f "$file.new" "$file"
    rm -rf "$obj/publish"
}

size() { # FILE LIMIT-IN-MB
    wc -c <"$1" | awk -v file="${1#"$root/"}" -v limit="$2" '{
        over = ($1 > limit * 1e6) ? sprintf(", warning: more than %.1f MB", limit) : ""
        printf "%s: %.2f MB%s\n", file, $1 / 1e6, over }' >&2
}

# What is built: linked how, to which file, of which size at most.
case ${TCPPROXY_LINK:-${linux:+static}} in
    static) wanted=static binary=$out/tcpproxy limit=3.9 ;;
    dynamic) wanted=dynamic binary=$out/tcpproxy-dynamic limit=2.9 ;;
    '') wanted=dynamic binary=$out/tcpproxy limit=2.9 ;; # macOS has no static executables
    portable) wanted=portable binary=$out/portable/tcpproxy limit=0.1 ;;
    *) usage "TCPPROXY_LINK: '$TCPPROXY_LINK' is not 'static', 'dynamic' or 'portable'" ;;
esac

build() ( # does nothing, and says nothing, when the binary is newer than all it is made from
    lock
    if [ -x "$binary" ] && [ -z "$(cd "$root" && find TcpProxy.cs TcpProxy.csproj build.sh -newer "$binary")" ]; then exit; fi
    need_sdk
    : >"$obj/begun"
    if [ $wanted = portable ]; then
        sdk portable publish TcpProxy.csproj -c Release -o "$out/portable" -p:PublishAot=false -p:RunAnalyzers=false --no-self-contained ||
            die "out/portable could not be built"
    else
        find_toolchain $wanted
        say "toolchain: $compiler + $linker -> $kind"
        publish "$binary" $props
    fi
    touch -r "$obj/begun" "$binary" # a source that was changed meanwhile is newer
    "$binary" --version >/dev/null || die "${binary#"$root/"} does not start"
)

try_it() (
    build
    have bash || die "try needs bash, for its /dev/tcp"
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    say '$ tcpproxy 127.0.0.1:0 echo --once'
    "$binary" 127.0.0.1:0 echo --once --port-file "$scratch/port" &
    until [ -s "$scratch/port" ]; do
        kill -0 $! 2>/dev/null || die "it has ended before it was ready"
        sleep 0.1
    done
    bash -c 'exec 3<>"/dev/tcp/${0%:*}/${0##*:}"; echo "hello through tcpproxy" >&3; head -n 1 <&3' "$(cat "$scratch/port")"
    wait $!
)

# -- testing ------------------------------------------------------------------------------------------------------

# Builds the tests (Debug: the program's assertions hold in them) and runs them against the native binary. The last line
# and the exit status come from the result file: no result, no test and a failure are all failures.
run_tests() { # ARGUMENTS for xunit's runner
    if [ -z "${TCPPROXY_BIN-}" ]; then build; TCPPROXY_BIN=$binary; fi
    export TCPPROXY_BIN
    [ $wanted != portable ] || export TCPPROXY_PORTABLE=1
    need_sdk
    (lock; sdk test msbuild tests/TcpProxy.Tests/TcpProxy.Tests.csproj -restore -p:Configuration=Debug) || die "the tests could not be built"
    [ -t 1 ] || set -- -noColor "$@"
    results=$obj/results.xml
    rm -f "$results"
    status=0
    "$obj/test/bin/TcpProxy.Tests/debug/TcpProxy.Tests" -noLogo "$@" -xml "$results" || status=$?
    counts=$(sed -n 's/.*<assembly \([^>]*\)>.*/ \1/p' "$results" 2>/dev/null | head -n 1)
    passed=$(count passed) failed=$(($(count failed) + $(count errors))) skipped=$(count skipped)
    if [ $status = 0 ] && [ "$failed" != 0 ]; then status=1; fi
    if [ $((passed + failed)) = 0 ]; then status=1; say "build.sh: error: no test has run"; fi
    echo "$passed passed, $failed failed, $skipped skipped"
    return $status
}

count() { # NAME: that attribute of the assembly's element, 0 without one
    number=$(printf '%s' "$counts" | sed -n "s/.* $1=\"\([0-9]*\)\".*/\1/p")
    echo "${number:-0}"
}

check() (
    lock
    need_sdk
    find_toolchain $wanted
    cd "$root"
    for project in TcpProxy.csproj tests/*/*.csproj; do
        say "check: $project: format"
        sdk check restore "$project"
        ArtifactsPath=$obj/check dotnet format "$project" --no-restore --verify-no-changes || die "not clean; dotnet format $project mends what it can"
        [ $project != TcpProxy.csproj ] || continue
        say "check: $project: analyzers"
        sdk check msbuild "$project" -restore -t:Rebuild -p:Configuration=Release || die "warnings are errors here"
    done
    say "check: TcpProxy.csproj: analyzers without the tests' access, trim and AOT warnings"
    publish "$obj/checked" $props -p:WithoutTests=true -p:RunAnalyzers=true -p:TreatWarningsAsErrors=true
    rm "$obj/checked"
    say "check: clean"
)

bench() {
    if [ -z "${TCPPROXY_BIN-}" ]; then build; TCPPROXY_BIN=$binary; fi
    export TCPPROXY_BIN
    need_sdk
    (lock; sdk bench msbuild tests/TcpProxy.Bench/TcpProxy.Bench.csproj -restore -p:Configuration=Release) || die "the benchmarks could not be built"
    exec "$obj/bench/bin/TcpProxy.Bench/release/TcpProxy.Bench" "$@"
}

# -- packaging ----------------------------------------------------------------------------------------------------

dist() (
    lock
    need_sdk
    find_toolchain $wanted
    say "toolchain: $compiler + $linker -> $kind"
    version=$(cd "$root" && dotnet msbuild TcpProxy.csproj -nologo -getProperty:Version 9>&-)
    dist=$out/dist
    rm -rf "$dist"
    mkdir -p "$dist"
    epoch=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 0)}
    if [ -n "$linux" ]; then dist_linux; else dist_macos; fi
    say "win-x64, win-arm64: not made: native code for Windows is linked on Windows; run ./build.ps1 dist there"
    cd "$dist"
    rm -rf stage
    if have sha256sum; then sha256sum tcpproxy-*; else shasum -a 256 tcpproxy-*; fi | tee SHA256SUMS
)

target() { # RID LIMIT-IN-MB PROPERTIES...
    rid=$1 limit=$2; shift 2
    publish "$dist/tcpproxy-$version-$rid" "$@"
    size "$dist/tcpproxy-$version-$rid" "$limit"
    package "$rid"
}

# The same files give the same bytes, whoever packs them and when.
archive() { # FOLDER NAME...: as tar on stdout
    folder=$1; shift
    if tar --version 2>/dev/null | grep -q GNU; then
        tar -C "$folder" --format=ustar --sort=name --mtime="@$epoch" --owner=0 --group=0 --numeric-owner --mode=go-w,a+rX -cf - "$@"
    else
        tar -C "$folder" --format ustar --uid 0 --gid 0 -cf - "$@"
    fi
}

section() { # HEADING: the first fenced block below it in README.md, or what it says where it has none
    awk -v heading="$1" '$0 == heading { on = 1; next } !on { next }
        /^```/ { if (++fenced == 2) exit; next }
        fenced { block = block $0 "\n"; next }
        /^#+ / { exit }
        { text = text $0 "\n" }
        END { printf "%s", fenced ? block : text }' "$root/README.md"
}

package() { # RID: a tar of all that one needs
    name=tcpproxy-$version-$1
    stage=$dist/stage/$name
    mkdir -p "$stage"
    cp "$dist/$name" "$stage/tcpproxy"
    cp "$root/README.md" "$stage"
    section '## Licence' >"$stage/LICENCE"
    section '### The file' >"$stage/tcpproxy.conf"
    if [ -n "$linux" ]; then
        # This machine's binary writes the unit, for where the files will be; a port below 1024 is allowed.
        "$dist/tcpproxy-$version-linux-$here" -c "$stage/tcpproxy.conf" --install-service >"$stage/unit" ||
            die "the sample configuration in README.md is not valid"
        sed -e 's|^ExecStart=.*|ExecStart=/usr/local/bin/tcpproxy -c /etc/tcpproxy.conf|' \
            -e 's|^ExecReload=.* --check-config .*|ExecReload=/usr/local/bin/tcpproxy --check-config -c /etc/tcpproxy.conf|' \
            -e 's/^ProtectHome=.*/ProtectHome=yes/' \
            -e 's/^PrivateTmp=.*/PrivateTmp=yes/' -e '/^WorkingDirectory=/d' -e 's/^User=nobody$/DynamicUser=yes/' \
            -e 's/^\(AmbientCapabilities\|CapabilityBoundingSet\)=.*/\1=CAP_NET_BIND_SERVICE/' "$stage/unit" >"$stage/tcpproxy.service"
        rm "$stage/unit"
    fi
    archive "$dist/stage" "$name" | gzip -n9 >"$dist/$name.tar.gz"
}

# -- the image: a layer for each architecture that holds the binary and nothing else (OCI image layout 1.0)

digest() { sha256sum "$1" | cut -d ' ' -f 1; }

blob() { # FILE MEDIA-TYPE: puts it where its digest says; its descriptor, without the closing brace, on stdout
    sum=$(digest "$1")
    printf '{"mediaType":"application/vnd.oci.image.%s","digest":"sha256:%s","size":%d' "$2" "$sum" "$(wc -c <"$1")"
    mv "$1" "$oci/blobs/sha256/$sum"
}

image() { # RID...
    oci=$dist/stage/oci
    mkdir -p "$oci/blobs/sha256"
    created=$(date -u -d "@$epoch" +%Y-%m-%dT%H:%M:%SZ)
    manifests=
    for rid; do
        case $rid in linux-x64) architecture=amd64 ;; linux-arm64) architecture=arm64 ;; esac
        archive "$dist/stage/tcpproxy-$version-$rid" tcpproxy >"$oci/layer"
        layer=sha256:$(digest "$oci/layer")
        gzip -n9 <"$oci/layer" >"$oci/layer.gz"
        rm "$oci/layer"
        printf '{"created":"%s","architecture":"%s","os":"linux","config":{"User":"65532:65532","Entrypoint":["/tcpproxy"],"WorkingDir":"/","Labels":{"org.opencontainers.image.title":"tcpproxy","org.opencontainers.image.version":"%s","org.opencontainers.image.licenses":"MIT"}},"rootfs":{"type":"layers","diff_ids":["%s"]}}' \
            "$created" $architecture "$version" "$layer" >"$oci/config"
        printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s},"layers":[%s}]}' \
            "$(blob "$oci/config" config.v1+json)" "$(blob "$oci/layer.gz" layer.v1.tar+gzip)" >"$oci/manifest"
        manifests="$manifests${manifests:+,}$(blob "$oci/manifest" manifest.v1+json),\"platform\":{\"architecture\":\"$architecture\",\"os\":\"linux\"}}"
    done
    index='{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[%s]}'
    printf "$index" "$manifests" >"$oci/all"
    printf "$index" "$(blob "$oci/all" index.v1+json),\"annotations\":{\"org.opencontainers.image.ref.name\":\"$version\",\"io.containerd.image.name\":\"docker.io/library/tcpproxy:$version\"}}" >"$oci/index.json"
    printf '{"imageLayoutVersion":"1.0.0"}' >"$oci/oci-layout"
    archive "$oci" blobs index.json oci-layout >"$dist/tcpproxy-$version-oci.tar"
}

dist_linux() {
    case $(uname -m) in
        x86_64) here=x64 there=arm64 triple=aarch64-linux-gnu packages='gcc-aarch64-linux-gnu libc6-dev-arm64-cross' ;;
        aarch64) here=arm64 there=x64 triple=x86_64-linux-gnu packages='gcc-x86-64-linux-gnu libc6-dev-amd64-cross' ;;
        *) die "dist: no known target for $(uname -m)" ;;
    esac
    target linux-$here 3.9 $props
    # Crossing takes clang and lld, which serve every target alike, and the other machine's C library.
    targets=linux-$here
    if links clang --target=$triple -fuse-ld=lld -static-pie; then
        targets="linux-$here linux-$there"
        target linux-$there 3.9 -r linux-$there -p:CppCompilerAndLinker=clang -p:LinkerFlavor=lld -p:StaticExecutable=true
    else
        say "linux-$there: not made: no cross toolchain; on Debian: apt-get install -y clang lld $packages"
    fi
    image $targets
    say "osx-arm64, osx-x64: not made: native code for macOS is linked on macOS; run ./build.sh dist there"
}

dist_macos() {
    for rid in osx-arm64 osx-x64; do target $rid 2.0 -r $rid $props; done
    say "linux-x64, linux-arm64: not made: run ./build.sh dist on Linux"
}

# -- the words ----------------------------------------------------------------------------------------------------

word=${1-build}
[ $# = 0 ] || shift
case $word in
    build) [ $# = 0 ] || usage "build: unknown argument '$1'"; build; size "$binary" $limit ;;
    try) try_it ;;
    run) build; exec "$binary" "$@" ;;
    test)
        for filter; do set -- "$@" -method "*$filter*"; shift; done
        run_tests "$@" ;;
    check) check ;;
    bench) bench "$@" ;;
    fuzz)
        [ $# = 1 ] && [ "$1" -gt 0 ] 2>/dev/null || usage "fuzz: how many SECONDS?"
        export TCPPROXY_FUZZ_SECONDS="$1"
        run_tests -class '*Fuzz*' ;;
    dist) dist ;;
    clean) rm -rf "$out" "$root/obj" "$root/bin" "$root"/tests/*/obj "$root"/tests/*/bin ;;
    help | -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" ;;
    *) usage "unknown word '$word'" ;;
esac
