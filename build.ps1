# build.ps1 - builds, tests and packages tcpproxy on Windows; elsewhere build.sh does it
#
#   ./build.ps1                  build out\tcpproxy.exe
#   ./build.ps1 try              the same, then send a line through it: client -> tcpproxy -> its built-in echo server
#   ./build.ps1 run ARGS         run it, built first if the sources are newer
#   ./build.ps1 test [FILTER...] run the tests, or those with a FILTER in their class or method name
#   ./build.ps1 check            formatting, every analyzer, trim and AOT warnings: all clean or it fails
#   ./build.ps1 bench ARGS       run the benchmarks
#   ./build.ps1 fuzz SECONDS     run each fuzz test for SECONDS
#   ./build.ps1 dist             out\dist: for each target that this machine can make a binary and a package (binary, sample
#                                configuration, README, licence)
#   ./build.ps1 clean            remove all that was built
#   ./build.ps1 help             this text
#
#   $env:TCPPROXY_BIN = FILE     test, bench, fuzz: use FILE instead of building one
#
# Where Windows lets no script run: powershell -ExecutionPolicy Bypass -File build.ps1 ...

# No param block: PowerShell would take the proxy's own options, such as -l, for parameters of this script. A list and a
# number that it has made of a,b and 7d are the text again that was written.
$words = @($args | ForEach-Object { $_ -join ',' })
$ErrorActionPreference = 'Stop'
if ($PSVersionTable.PSVersion.Major -ge 6 -and -not $IsWindows) {
    # As literals: from a variable PowerShell would expand * and ~.
    $literals = foreach ($word in $words) {
        "'" + [Management.Automation.Language.CodeGeneration]::EscapeSingleQuotedStringContent($word) + "'"
    }
    & ([scriptblock]::Create("& `$args[0] $literals")) "$PSScriptRoot/build.sh"
    exit $LASTEXITCODE
}

$root = $PSScriptRoot
$out = Join-Path $root 'out'
$obj = Join-Path $out 'obj' # intermediate files, a folder for each kind of build so that none disturbs another
$binary = Join-Path $out 'tcpproxy.exe'
$env:DOTNET_CLI_TELEMETRY_OPTOUT = '1'
$env:DOTNET_NOLOGO = '1'

function Say([string] $text) { [Console]::Error.WriteLine($text) }
function Die([string] $text) { Say "build.ps1: error: $text"; exit 1 }
function Usage([string] $text) { Say "build.ps1: error: $text; ./build.ps1 help lists the words"; exit 2 }

# -- what this machine has ----------------------------------------------------------------------------------------

function Need-Sdk {
    $version = 'none'
    if (Get-Command dotnet -ErrorAction SilentlyContinue) { $version = [string] (& dotnet --version) }
    if ($version -match '^(\d+)\.' -and [int] $Matches[1] -ge 10) { return }
    if (-not $version) { $version = 'none' } # dotnet is here without an SDK
    Die ".NET SDK 10 is needed (found: $version): winget install Microsoft.DotNet.SDK.10"
}

# Whether Visual Studio can link for these machines (x86.x64 or ARM64); the SDK finds its linker by itself.
function Test-Linker([string] $machines) {
    $vswhere = Join-Path ${env:ProgramFiles(x86)} 'Microsoft Visual Studio\Installer\vswhere.exe'
    return (Test-Path $vswhere) -and [bool] (& $vswhere -latest -prerelease -products * -property installationPath `
        -requires "Microsoft.VisualStudio.Component.VC.Tools.$machines")
}

function Need-Linker {
    if (Test-Linker 'x86.x64') { Say 'toolchain: Visual Studio -> dynamic'; return }
    Die ('no linker: winget install Microsoft.VisualStudio.2022.BuildTools --override ' +
        '"--passive --add Microsoft.VisualStudio.Workload.VCTools --includeRecommended"')
}

# -- building -----------------------------------------------------------------------------------------------------

# FOLDER COMMAND...: runs dotnet with its files below out\obj\FOLDER; tells whether it went well. What it writes goes to
# stderr: stdout belongs to what is run.
function Invoke-Sdk([string] $folder, [string[]] $command) {
    $env:ArtifactsPath = Join-Path $obj $folder
    Push-Location $root
    try { & dotnet @command | ForEach-Object { Say $_ } } finally { Pop-Location; $env:ArtifactsPath = $null }
    return $LASTEXITCODE -eq 0
}

# From nothing every time: the SDK's own incremental native build does not notice that a setting has changed. Warnings
# are for check: the new rules of a newer SDK do not stop who only wants the binary.
function Publish([string] $file, [string[]] $properties) {
    $folder = Join-Path $obj 'publish'
    if (Test-Path $folder) { Remove-Item -Recurse -Force $folder }
    $good = Invoke-Sdk 'publish' (@('publish', 'TcpProxy.csproj', '-c', 'Release', '-o', "$folder\to", '-nologo', '-v:quiet',
        '-p:RunAnalyzers=false', '-p:TreatWarningsAsErrors=false') + $properties)
    if (-not $good) { Die "$file could not be built" }
    Copy-Item "$folder\to\tcpproxy.exe" $file -Force
    Remove-Item -Recurse -Force $folder
}

function Show-Size([string] $file) {
    $bytes = (Get-Item $file).Length
    $over = ''
    if ($bytes -gt 2.9e6) { $over = ', warning: more than 2.9 MB' }
    Say ([string]::Format([cultureinfo]::InvariantCulture, '{0}: {1:0.00} MB{2}', $file, $bytes / 1e6, $over))
}

# Does nothing, and says nothing, when the binary is newer than all it is made from.
function Build {
    if (Test-Path $binary) {
        $made = (Get-Item $binary).LastWriteTimeUtc
        $newer = Get-Item "$root\TcpProxy.cs", "$root\TcpProxy.csproj", "$root\build.ps1" |
            Where-Object { $_.LastWriteTimeUtc -gt $made }
        if (-not $newer) { return }
    }
    Need-Sdk
    Need-Linker
    $begun = [DateTime]::UtcNow
    New-Item -ItemType Directory -Force $obj | Out-Null
    Publish $binary @()
    (Get-Item $binary).LastWriteTimeUtc = $begun # a source that was changed meanwhile is newer
    & $binary --version | Out-Null
    if ($LASTEXITCODE -ne 0) { Die "$binary does not start" }
}

function Try-It {
    Build
    $port = [IO.Path]::GetTempFileName()
    Remove-Item $port # it is there again when the proxy is ready
    Say '> tcpproxy 127.0.0.1:0 echo --once'
    $proxy = Start-Process $binary @('127.0.0.1:0', 'echo', '--once', '--port-file', "`"$port`"") -NoNewWindow -PassThru
    while (-not (Test-Path $port)) {
        if ($proxy.HasExited) { Die 'it has ended before it was ready' }
        Start-Sleep -Milliseconds 100
    }
    $null = $proxy.Handle # without it Windows PowerShell does not know the exit status
    $client = New-Object Net.Sockets.TcpClient '127.0.0.1', ([int] ((Get-Content $port) -split ':')[-1])
    $stream = $client.GetStream()
    $line = [Text.Encoding]::ASCII.GetBytes("hello through tcpproxy`n")
    $stream.Write($line, 0, $line.Length)
    Write-Output (New-Object IO.StreamReader $stream).ReadLine()
    $client.Close()
    $proxy.WaitForExit()
    exit $proxy.ExitCode
}

# -- testing ------------------------------------------------------------------------------------------------------

# Builds the tests (Debug: the program's assertions hold in them) and runs them against the native binary. The last line
# and the exit status come from the result file: no result, no test and a failure are all failures.
function Run-Tests([string[]] $arguments) {
    if (-not $env:TCPPROXY_BIN) { Build; $env:TCPPROXY_BIN = $binary }
    Need-Sdk
    if (-not (Invoke-Sdk 'test' @('msbuild', 'tests/TcpProxy.Tests/TcpProxy.Tests.csproj', '-restore', '-nologo', '-v:quiet',
        '-p:Configuration=Debug'))) { Die 'the tests could not be built' }
    $results = Join-Path $obj 'results.xml'
    if (Test-Path $results) { Remove-Item $results }
    if ([Console]::IsOutputRedirected) { $arguments = @('-noColor') + $arguments }
    & "$obj\test\bin\TcpProxy.Tests\debug\TcpProxy.Tests.exe" -noLogo @arguments -xml $results
    $status = $LASTEXITCODE
    $passed = 0; $failed = 0; $skipped = 0
    if (Test-Path $results) {
        $assembly = ([xml] (Get-Content -Raw -Encoding UTF8 $results)).assemblies.assembly
        $passed = [int] $assembly.passed
        $failed = [int] $assembly.failed + [int] $assembly.errors
        $skipped = [int] $assembly.skipped
    }
    if ($status -eq 0 -and $failed -ne 0) { $status = 1 }
    if ($passed + $failed -eq 0) { $status = 1; Say 'build.ps1: error: no test has run' }
    Write-Output "$passed passed, $failed failed, $skipped skipped"
    exit $status
}

function Check {
    Need-Sdk
    Need-Linker
    New-Item -ItemType Directory -Force $obj | Out-Null
    $projects = @('TcpProxy.csproj')
    $projects += Get-ChildItem "$root\tests\*\*.csproj" | ForEach-Object { "tests/$($_.Directory.Name)/$($_.Name)" }
    foreach ($project in $projects) {
        Say "check: ${project}: format"
        if (-not (Invoke-Sdk 'check' @('restore', $project, '-nologo', '-v:quiet'))) { Die "$project could not be restored" }
        if (-not (Invoke-Sdk 'check' @('format', $project, '--no-restore', '--verify-no-changes'))) {
            Die "not clean; dotnet format $project mends what it can"
        }
        if ($project -eq 'TcpProxy.csproj') { continue }
        Say "check: ${project}: analyzers"
        if (-not (Invoke-Sdk 'check' @('msbuild', $project, '-restore', '-t:Rebuild', '-nologo', '-v:quiet',
            '-p:Configuration=Release'))) { Die 'warnings are errors here' }
    }
    Say 'check: TcpProxy.csproj: analyzers without the tests'' access, trim and AOT warnings'
    $checked = Join-Path $obj 'checked.exe'
    Publish $checked @('-p:WithoutTests=true', '-p:RunAnalyzers=true', '-p:TreatWarningsAsErrors=true')
    Remove-Item $checked
    Say 'check: clean'
}

function Bench([string[]] $arguments) {
    if (-not $env:TCPPROXY_BIN) { Build; $env:TCPPROXY_BIN = $binary }
    Need-Sdk
    if (-not (Invoke-Sdk 'bench' @('msbuild', 'tests/TcpProxy.Bench/TcpProxy.Bench.csproj', '-restore', '-nologo', '-v:quiet',
        '-p:Configuration=Release'))) { Die 'the benchmarks could not be built' }
    & "$obj\bench\bin\TcpProxy.Bench\release\TcpProxy.Bench.exe" @arguments
    exit $LASTEXITCODE
}

# -- packaging ----------------------------------------------------------------------------------------------------

# HEADING: the first fenced block below it in README.md, or what it says where it has none.
function Get-Section([string] $heading) {
    $on = $false; $fences = 0; $text = @(); $block = @()
    foreach ($line in [IO.File]::ReadAllLines("$root\README.md")) {
        if (-not $on) { $on = $line -ceq $heading; continue }
        if ($line.StartsWith('```')) { if (++$fences -eq 2) { break }; continue }
        if ($fences -eq 1) { $block += $line; continue }
        if ($line -match '^#+ ') { break }
        $text += $line
    }
    $lines = $text
    if ($fences -gt 0) { $lines = $block }
    return ($lines -join "`n") + "`n"
}

# FILE RID: the binary FILE.exe, and FILE.zip of all that one needs.
function Target([string] $file, [string] $rid) {
    Publish "$file.exe" @('-r', $rid)
    Show-Size "$file.exe"
    $stage = Join-Path $obj (Split-Path -Leaf $file)
    if (Test-Path $stage) { Remove-Item -Recurse -Force $stage }
    New-Item -ItemType Directory -Force $stage | Out-Null
    Copy-Item "$file.exe" "$stage\tcpproxy.exe"
    Copy-Item "$root\README.md" $stage
    [IO.File]::WriteAllText("$stage\LICENCE", (Get-Section '## Licence'))
    [IO.File]::WriteAllText("$stage\tcpproxy.conf", (Get-Section '### The file'))
    Compress-Archive -Path $stage -DestinationPath "$file.zip"
    Remove-Item -Recurse -Force $stage
}

function Dist {
    Need-Sdk
    Need-Linker
    $version = & dotnet msbuild "$root\TcpProxy.csproj" -nologo -getProperty:Version
    if ($LASTEXITCODE -ne 0) { Die "no version: $version" }
    $dist = Join-Path $out 'dist'
    if (Test-Path $dist) { Remove-Item -Recurse -Force $dist }
    New-Item -ItemType Directory -Force $dist, $obj | Out-Null
    Target "$dist\tcpproxy-$version-win-x64" 'win-x64'
    if (Test-Linker 'ARM64') {
        Target "$dist\tcpproxy-$version-win-arm64" 'win-arm64'
    } else {
        Say 'win-arm64: not made: no tools for it: Visual Studio Installer, Microsoft.VisualStudio.Component.VC.Tools.ARM64'
    }
    Say 'linux-x64, linux-arm64: not made: run ./build.sh dist on Linux'
    Say 'osx-arm64, osx-x64: not made: native code for macOS is linked on macOS; run ./build.sh dist there'
    $sums = Get-ChildItem $dist -Filter 'tcpproxy-*' | ForEach-Object {
        (Get-FileHash -Algorithm SHA256 $_.FullName).Hash.ToLowerInvariant() + "  $($_.Name)"
    }
    [IO.File]::WriteAllText((Join-Path $dist 'SHA256SUMS'), (@($sums) -join "`n") + "`n")
    Write-Output $sums
}

# -- the words ----------------------------------------------------------------------------------------------------

$word = 'build'
$rest = @()
if ($words.Count -gt 0) { $word = $words[0] }
if ($words.Count -gt 1) { $rest = @($words[1..($words.Count - 1)]) }
$given = $env:TCPPROXY_BIN, $env:TCPPROXY_FUZZ_SECONDS
try {
    switch -Exact ($word) {
        'build' {
            if ($rest.Count -gt 0) { Usage "build: unknown argument '$($rest[0])'" }
            Build
            Show-Size $binary
        }
        'try' { Try-It }
        'run' { Build; & $binary @rest; exit $LASTEXITCODE }
        'test' {
            Run-Tests @($rest | ForEach-Object { '-method'; "*$_*" })
        }
        'check' { Check }
        'bench' { Bench $rest }
        'fuzz' {
            $seconds = 0
            if ($rest.Count -ne 1 -or -not [int]::TryParse($rest[0], [ref] $seconds) -or $seconds -le 0) {
                Usage 'fuzz: how many SECONDS?'
            }
            $env:TCPPROXY_FUZZ_SECONDS = "$seconds"
            Run-Tests @('-class', '*Fuzz*')
        }
        'dist' { Dist }
        'clean' {
            foreach ($folder in @($out, "$root\obj", "$root\bin", "$root\tests\*\obj", "$root\tests\*\bin")) {
                if (Test-Path $folder) { Remove-Item -Recurse -Force $folder }
            }
        }
        { $_ -in 'help', '-h', '--help' } {
            foreach ($line in Get-Content $PSCommandPath) {
                if ($line -notmatch '^#') { break }
                $line -replace '^# ?', ''
            }
        }
        default { Usage "unknown word '$word'" }
    }
} finally { # a console keeps what is set here, and its next test would test that binary without building it
    $env:TCPPROXY_BIN, $env:TCPPROXY_FUZZ_SECONDS = $given
}
exit 0 # not the status of something before
