using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>As the only program of a container: process 1, on a root that holds nothing else.</summary>
public sealed class ContainerTests : EndToEndTest
{
    [Theory(Timeout = Quick)]
    [InlineData("TERM")]
    [InlineData("INT")]
    public async Task Process_1_on_a_read_only_root_serves_and_drains(string signal)
    {
        Tool.NeedRoot("namespaces");
        Tool.NeedLibc("a framework needs more files");
        Tool.Need("setpriv", "util-linux");
        string root = Directory.CreateDirectory(Given.Path("root")).FullName;
        File.Copy(ProxyProcess.Binary, Path.Combine(root, "tcpproxy"));
        await ServeAndDrain(root, signal);
    }

    [Theory(Timeout = Quick)]
    [InlineData("amd64")]
    [InlineData("arm64")]
    public async Task The_image_is_one_that_others_read(string architecture)
    {
        string skopeo = Tool.Need("skopeo", "skopeo");
        string image = Dist("tcpproxy-*-oci.tar");
        string copy = Given.Path("copy");
        (await Tool.Run(skopeo, "copy", "-q", "--override-arch", architecture, $"oci-archive:{image}", $"dir:{copy}")).Good();
        string inspected = (await Tool.Run(skopeo, "inspect", "--override-arch", architecture, $"oci-archive:{image}")).Good();
        Assert.Contains($"\"Architecture\": \"{architecture}\"", inspected, StringComparison.Ordinal);
        Assert.Contains("\"io.containerd.image.name\":\"docker.io/library/tcpproxy:", // else podman calls it by its version
            (await Tool.Run("tar", "-xOf", image, "index.json")).Good(), StringComparison.Ordinal);
        string layer = Assert.Single(
            Directory.GetFiles(copy), f => new FileInfo(f).Length > 1 << 20);
        Assert.Equal("tcpproxy\n", (await Tool.Run("tar", "-tzf", layer)).Good());
        string root = Directory.CreateDirectory(Given.Path("root")).FullName;
        (await Tool.Run("tar", "-C", root, "-xzf", layer)).Good();
        string rid = architecture == "amd64" ? "x64" : "arm64";
        Assert.Equal(File.ReadAllBytes(Dist($"tcpproxy-*-linux-{rid}")), File.ReadAllBytes(Path.Combine(root, "tcpproxy")));
        if (architecture == "amd64" && Tool.IsRoot)
        {
            await ServeAndDrain(root, "TERM");
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Orphans_are_reaped()
    {
        Tool.NeedRoot("namespaces");
        Tool.NeedLibc("waitid");
        string nsenter = Tool.Need("nsenter", "util-linux");
        (ProxyProcess proxy, int id) = await Process1([], string.Empty, "127.0.0.1:0", "echo");
        (await Tool.Run(
            nsenter, "--target", $"{id}", "--pid", "sh", "-c", "for i in 1 2 3 4 5; do (setsid sleep 3 >/dev/null 2>&1 &) ; done")).Good();
        Assert.Equal(5, ChildrenOf(id).Count);
        await Wait.Until(() => ChildrenOf(id).Count == 0, "the orphans to be reaped");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        await Kill(proxy, id, "TERM");
    }

    [Fact(Timeout = Quick)]
    public async Task Filters_beside_orphans_keep_their_exit_status()
    {
        const int Count = 100;
        Tool.NeedRoot("namespaces");
        Tool.NeedLibc("filters");
        (ProxyProcess proxy, int id) = await Process1(
            [], string.Empty, "127.0.0.1:0", "echo", "--filter-up", "sh:(setsid sleep 0.3 >/dev/null 2>&1 &); cat");
        await Wait.Many(Count, 4, async _ =>
        {
            Peer client = await Given.Client(proxy);
            await client.Ask("hello");
            client.Finish();
            await client.ExpectEnd();
            Assert.Equal("--", (await proxy.Connection(client)).End);
        });
        await Wait.Until(() => ChildrenOf(id).Count == 0, "all children to be reaped");
        await Kill(proxy, id, "TERM");
    }

    [Fact(Timeout = Slow)]
    public async Task A_package_has_all_that_one_needs()
    {
        string package = Dist("tcpproxy-*-linux-x64.tar.gz");
        (await Tool.Run("tar", "-C", Given.Folder, "-xzf", package)).Good();
        string folder = Path.Combine(Given.Folder, Path.GetFileName(package)[..^".tar.gz".Length]);
        Assert.Equal(
            ["LICENCE", "README.md", "tcpproxy", "tcpproxy.conf", "tcpproxy.service"],
            Directory.GetFileSystemEntries(folder).Select(Path.GetFileName).Order(StringComparer.Ordinal));
        string binary = Path.Combine(folder, "tcpproxy");
        Assert.Equal("configuration is valid: 2 routes\n",
            (await Tool.Run(binary, "-c", Path.Combine(folder, "tcpproxy.conf"), "--check-config")).Good());
        Assert.StartsWith("MIT.", File.ReadAllText(Path.Combine(folder, "LICENCE")).TrimStart(), StringComparison.Ordinal);
        string[] listed = (await Tool.Run("tar", "--numeric-owner", "-tvzf", package)).Good().TrimEnd().Split('\n');
        Assert.All(listed, l => Assert.Equal("0/0", l.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1]));
        Assert.Single(listed.Select(l => string.Join(' ', l.Split(' ', StringSplitOptions.RemoveEmptyEntries)[3..5])).Distinct());
        Outcome sums = await Tool.Run("sha256sum", ["--check", "--quiet", "SHA256SUMS"], 60, Path.GetDirectoryName(package));
        Assert.Equal((0, string.Empty), (sums.Status, sums.Out));

        string analyze = Tool.Need("systemd-analyze", "systemd");
        string unit = Given.Write("tcpproxy.service", File.ReadAllText(Path.Combine(folder, "tcpproxy.service"))
            .Replace("/usr/local/bin/tcpproxy", binary, StringComparison.Ordinal));
        Outcome verified = await Tool.Run(analyze, "verify", "--man=no", unit);
        Assert.Equal((0, string.Empty), (verified.Status, verified.Err));
    }

    /// <summary>As a container runs it: a user without a name, no rights, nothing that could be written.</summary>
    private async Task ServeAndDrain(string root, string signal)
    {
        Directory.CreateDirectory(Path.Combine(root, "run"));
        string box = Directory.CreateDirectory(Given.Path("box")).FullName;
        Directory.CreateDirectory(Path.Combine(box, "run"));
        string enter = $"mount --bind {root} {root} && mount -o remount,ro,bind {root} && mount --bind {box}/run {root}/run "
            + $"&& chown 65532 {box}/run && exec setpriv --no-new-privs chroot --userspec=65532:65532 {root} \"$0\" \"$@\"";
        (ProxyProcess proxy, int id) = await Process1(
            ["sh", "-c", enter], box, "127.0.0.1:0", "echo");
        Assert.Equal("1", Namespaced(id));
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        await Tool.Run("kill", $"-{signal}", $"{id}");
        await proxy.Line("draining");
        await client.Ask("still there");
        client.Finish();
        await client.ExpectEnd();
        Assert.Equal(0, await proxy.Exit(5));
        Assert.Empty(Directory.GetFileSystemEntries(Path.Combine(box, "run")));
    }

    /// <summary>The proxy as process 1 of a namespace, and its number outside.</summary>
    private async Task<(ProxyProcess Proxy, int Id)> Process1(string[] enter, string box, params string[] arguments)
    {
        string unshare = Tool.Need("unshare", "util-linux");
        Launch launch = new()
        {
            Before = [unshare, "--mount", "--pid", "--fork", "--kill-child", .. enter],
            Root = box,
            AwaitReady = false,
        };
        if (box.Length > 0)
        {
            launch = launch with { Binary = "/tcpproxy", PortFile = "/run/ports" };
        }

        ProxyProcess proxy = await Given.Proxy(launch, arguments);
        await proxy.Ready();
        return (proxy, Assert.Single(ChildrenOf(proxy.Id)));
    }

    private static async Task Kill(ProxyProcess proxy, int id, string signal)
    {
        (await Tool.Run("kill", $"-{signal}", $"{id}")).Good();
        Assert.Equal(0, await proxy.Exit());
    }

    private static string Dist(string name)
    {
        string dist = Path.Combine(Path.GetDirectoryName(ProxyProcess.Binary)!, "dist");
        string[] made = Directory.Exists(dist) ? Directory.GetFiles(dist, name) : [];
        Assert.SkipWhen(made.Length == 0, $"no {name}: ./build.sh dist");
        return made[0];
    }

    private static string Namespaced(int id) => File.ReadLines($"/proc/{id}/status")
        .First(l => l.StartsWith("NSpid:", StringComparison.Ordinal)).Split('\t')[^1];

    /// <summary>The dead that nobody has reaped as well.</summary>
    private static List<int> ChildrenOf(int id)
    {
        List<int> children = [];
        foreach (string folder in Directory.GetDirectories("/proc").Where(f => char.IsAsciiDigit(Path.GetFileName(f)[0])))
        {
            try
            {
                string stat = File.ReadAllText($"{folder}/stat");
                if (stat[(stat.LastIndexOf(')') + 2)..].Split(' ')[1] == $"{id}")
                {
                    children.Add(int.Parse(Path.GetFileName(folder), CultureInfo.InvariantCulture));
                }
            }
            catch (IOException)
            {
                // it has gone meanwhile
            }
        }

        return children;
    }
}
