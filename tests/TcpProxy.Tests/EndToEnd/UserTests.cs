using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--user: root is given up for good.</summary>
public sealed class UserTests : EndToEndTest
{
    [Theory(Timeout = Quick)]
    [InlineData("nobody", "65534", "65534", "65534")]
    [InlineData("nobody:daemon", "65534", "1", "1")]
    [InlineData("12345:6789", "12345", "6789", "6789")]
    [InlineData("1", "1", "1", "1")]
    public async Task All_threads_are_the_user_for_good(string user, string id, string group, string groups)
    {
        NeedRoot();
        int port = Enumerable.Range(600, 200).First(IsFree);
        ProxyProcess proxy = await Given.Proxy($"127.0.0.1:{port}", "echo", "--user", user, "--threads", "3");
        await (await Given.Client(proxy)).Ask("hello");
        string[] tasks = Directory.GetDirectories($"/proc/{proxy.Id}/task");
        Assert.True(tasks.Length > 3, $"{tasks.Length} threads");
        foreach (string task in tasks)
        {
            Dictionary<string, string> status = File.ReadLines($"{task}/status").Select(l => l.Split(":\t", 2))
                .Where(l => l.Length == 2).ToDictionary(l => l[0], l => l[1].Trim());
            Assert.Equal(string.Join('\t', Enumerable.Repeat(id, 4)), status["Uid"]); // real, effective, saved, file system
            Assert.Equal(string.Join('\t', Enumerable.Repeat(group, 4)), status["Gid"]);
            Assert.Equal(groups, status["Groups"]);
            Assert.All(
                ["CapPrm", "CapEff", "CapInh", "CapAmb"], set => Assert.Equal("0000000000000000", status[set]));

            // the runtime's finalizer is there before us; it starts no program
            Assert.True(
                status["NoNewPrivs"] == "1" || status["Name"] == ".NET Finalizer", $"{status["Name"]} may gain privileges");
        }
    }

    [Fact(Timeout = Quick)]
    public async Task The_groups_are_those_that_name_the_user()
    {
        NeedRoot();
        string unshare = Tool.Need("unshare", "util-linux");
        string group = Given.Write("group", "root:x:0:root\none:x:201:other,nobody\ntwo:x:202:nobody\nthree:x:203:nobody2\n");
        string passwd = Given.Write("passwd", "root:x:0:0::/:\nnobody:x:65534:65533::/:\n");
        Launch launch = new()
        {
            Before =
            [
                unshare, "--mount", "sh", "-c",
                $"mount --bind {group} /etc/group && mount --bind {passwd} /etc/passwd && exec \"$0\" \"$@\"",
            ],
        };
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", "echo", "--user", "nobody");
        await proxy.Line("listening"); // the port file is still root's
        Assert.Contains("\nGid:\t65533\t65533\t65533\t65533\n", Status(proxy), StringComparison.Ordinal);
        Assert.Contains("\nGroups:\t201 202 65533 \n", Status(proxy), StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task What_root_has_opened_stays_open_and_what_is_roots_to_remove_is_left()
    {
        NeedRoot();
        string log = Given.Path("log");
        string pid = Given.Path("pid");
        string socket = Given.Path("front");
        ProxyProcess proxy = await Given.Proxy(
            $"unix:{socket}", "echo", "--user", "nobody", "--log-file", log, "--pid-file", pid);
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        await Wait.Until(() => File.ReadAllText(log).Contains("event=connection", StringComparison.Ordinal), "the log");
        Assert.Equal(0, await proxy.Stop());
        Assert.True(File.Exists(pid));

        // the next start takes their places
        ProxyProcess next = await Given.Proxy($"unix:{socket}", "echo", "--pid-file", pid, "--log", "off");
        Assert.Equal($"{next.Id}\n", File.ReadAllText(pid));
        await (await Given.Client(next)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task Filters_are_the_user_and_gain_no_privileges()
    {
        NeedRoot();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "discard", "--user", "nobody",
            "--filter-up", "sh:grep -E '^(Uid|Groups|NoNewPrivs)' /proc/self/status >&2; cat");
        proxy.Tolerate("filter");
        Peer client = await Given.Client(proxy);
        await client.Send("hello");
        await Wait.Until(() => proxy.RawLog.Contains(
            @"Uid:\t65534\t65534\t65534\t65534\nGroups:\t65534 \nNoNewPrivs:\t1", StringComparison.Ordinal), "the filter's words");
        client.Finish();
    }

    [Fact(Timeout = Quick)]
    public async Task Without_root_ones_own_name_is_fine_and_another_is_not()
    {
        NeedRoot();
        string setpriv = Tool.Need("setpriv", "util-linux");
        if (OperatingSystem.IsWindows())
        {
            return;
        }

        string folder = Given.Folder;
        File.SetUnixFileMode(folder, File.GetUnixFileMode(folder) | UnixFileMode.OtherExecute | UnixFileMode.OtherRead);
        string binary = Given.Path("tcpproxy");
        File.Copy(ProxyProcess.Binary, binary);
        File.SetUnixFileMode(binary, (UnixFileMode)0b111_101_101);
        string[] become = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
        string ports = Given.Path("ports");
        Launch launch = new() { Before = [setpriv, .. become], Binary = binary, PortFile = $"/dev/shm/{Guid.NewGuid():N}" };
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", "echo", "--user", "nobody");
        await (await Given.Client(proxy)).Ask("hello");
        foreach (string other in (string[])["root", "daemon", "nobody:daemon", "1:1"])
        {
            Outcome outcome = await Tool.Run(setpriv, [.. become, binary, "127.0.0.1:0", "echo", "--user", other]);
            Assert.Equal((1, $"tcpproxy: error: --user: {other} is another user, which only root may become\n"),
                (outcome.Status, outcome.Err));
        }

        Outcome low = await Tool.Run(setpriv, [.. become, binary, "127.0.0.1:601", "echo"]);
        Assert.Equal(1, low.Status);
        Assert.EndsWith("cannot listen on 127.0.0.1:601: permission denied; ports below 1024 are for root, or for "
            + "CAP_NET_BIND_SERVICE\n", low.Err, StringComparison.Ordinal);
        Assert.False(File.Exists(ports));
    }

    [Theory(Timeout = Quick)]
    [InlineData("nosuchuser", "there is no user nosuchuser in /etc/passwd")]
    [InlineData("nobody:nosuchgroup", "there is no group nosuchgroup in /etc/group")]
    [InlineData("54321", "is not in /etc/passwd, so that its group is not known; write 54321:GROUP")]
    [InlineData("4294967295:1", "there is no user 4294967295")]
    [InlineData("1:4294967295", "there is no group 4294967295")]
    [InlineData("-1:1", "there is no user -1")]
    [InlineData("root", "is root, which shall be given up")]
    [InlineData("0:1", "is root, which shall be given up")]
    public async Task Nobody_to_become_is_an_error_before_anything_is_bound(string user, string expected)
    {
        NeedRoot();
        Outcome outcome = await Tool.Proxy("127.0.0.1:0", "echo", $"--user={user}", "--port-file", Given.Path("ports"));
        Assert.Equal(1, outcome.Status);
        Assert.StartsWith("tcpproxy: error: --user: ", outcome.Err, StringComparison.Ordinal);
        Assert.Contains(expected, Assert.Single(outcome.ErrLines), StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task A_list_that_root_alone_may_read_is_not_read_again()
    {
        NeedRoot();
        string list = Given.Write("denied", "192.0.2.1\n");
        if (OperatingSystem.IsWindows())
        {
            return;
        }

        File.SetUnixFileMode(list, UnixFileMode.UserRead | UnixFileMode.UserWrite);
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--deny", $"@{list}", "--user", "nobody");
        proxy.Tolerate("list");
        proxy.Signal(ProxyProcess.SigHup);
        await Wait.Until(
            () => proxy.RawLog.Contains("permission denied", StringComparison.Ordinal), "the list to be refused");
        await (await Given.Client(proxy)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task A_reload_binds_what_the_user_may_bind_and_says_what_it_may_not()
    {
        NeedRoot();
        string config = Given.Write("conf", "listen 127.0.0.1:0\nupstream echo\n");
        string folder = Directory.CreateDirectory(Given.Path("its")).FullName;
        (await Tool.Run("sh", "-c", $"chmod 711 {Given.Folder} && chmod 644 {config} && chown nobody {folder}")).Good();
        Launch launch = new() { PortFile = $"{folder}/ports" };
        ProxyProcess proxy = await Given.Proxy(launch, "-c", config, "--user", "nobody", "--pid-file", Given.Path("pid"));
        proxy.Tolerate("reload");
        int port = Enumerable.Range(600, 200).First(IsFree);
        File.WriteAllText(config, $"listen 127.0.0.1:0\nupstream echo\nlisten 127.0.0.1:{port}\nupstream echo\n");
        proxy.Signal(ProxyProcess.SigHup);
        LogLine refused = await proxy.Line("reload");
        Assert.Equal("error", refused["level"]);
        Assert.EndsWith($"cannot listen on 127.0.0.1:{port}: permission denied; ports below 1024 are for root, or for "
            + "CAP_NET_BIND_SERVICE; nothing has changed", refused["message"], StringComparison.Ordinal);
        File.WriteAllText(config, "listen 127.0.0.1:0\nupstream echo\nlisten 127.0.0.1:0\nname second\nupstream echo\n");
        proxy.Signal(ProxyProcess.SigHup);
        LogLine added = await proxy.Line("listening", l => l["route"] == "second");
        await Wait.Until(() => File.ReadAllLines(proxy.PortFilePath).Length == 2, "the second address in the port file");
        Assert.Equal(added["listen"], File.ReadAllLines(proxy.PortFilePath)[1]);
        await (await Given.Client(proxy)).Ask("hello");
    }

    private static string Status(ProxyProcess proxy) => File.ReadAllText($"/proc/{proxy.Id}/status");

    private static void NeedRoot()
    {
        Tool.NeedLibc("--user");
        Tool.NeedRoot("--user");
    }

    private static bool IsFree(int port)
    {
        using Socket probe = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            probe.Bind(new System.Net.IPEndPoint(System.Net.IPAddress.Loopback, port));
            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }
}
