using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class ConfigFileTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task The_same_words_in_a_file_make_the_same_proxy()
    {
        Upstream first = Given.Named("first");
        Upstream second = Given.Named("second");
        string file = Given.Write(
            "tcpproxy.conf",
            $"""
            # defaults for every route
            max-bytes-down 1
            log json

            listen 127.0.0.1:0      # the first route
              name "route one"
              upstream {first.Address}

            listen 127.0.0.1:0
            name second
            upstream {second.Address}
            max-bytes-down 2
            """);
        ProxyProcess proxy = await Given.Proxy("-c", file);
        Assert.Equal(2, proxy.Addresses.Count);

        // the default holds for the first route, its own setting for the second
        Peer client = await Given.Client(proxy, 0);
        Assert.Equal("f", Encoding.ASCII.GetString(await client.ReceiveToEnd()));
        Assert.Equal("se", Encoding.ASCII.GetString(await (await Given.Client(proxy, 1)).ReceiveToEnd()));

        LogLine line = await proxy.Connection(client);
        Assert.Equal("route one", line["route"]);
        Assert.StartsWith("{", line.Raw, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task The_command_line_wins_over_the_file()
    {
        Upstream upstream = Given.Echo();
        string file = Given.Write(
            "tcpproxy.conf",
            $"""
            max-bytes-down 1
            listen 127.0.0.1:0
            upstream {upstream.Address}
            listen 127.0.0.1:0
            upstream {upstream.Address}
            max-bytes-down 1
            """);
        ProxyProcess proxy = await Given.Proxy("-c", file, "--max-bytes-down", "3");
        foreach (int route in new[] { 0, 1 })
        {
            Peer client = await Given.Client(proxy, route);
            await client.Send("hello");
            Assert.Equal("hel", Encoding.ASCII.GetString(await client.ReceiveToEnd()));
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_value_may_be_quoted_and_hold_a_hash()
    {
        string socket = Given.Path("a socket #1");
        string file = Given.Write(
            "tcpproxy.conf", $"listen \"unix:{socket}\"\nname \"blank # and hash\"\nupstream echo\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        Assert.Equal($"unix:{socket}", proxy.Addresses[0]);
        await (await Given.Client(proxy)).Ask("hello");
        Assert.Equal("blank # and hash", (await proxy.Line("listening"))["route"]);
    }

    [Fact(Timeout = Quick)]
    public async Task Windows_line_ends_and_a_missing_last_one_do_not_matter()
    {
        string file = Given.Write(
            "tcpproxy.conf", "\uFEFFlisten 127.0.0.1:0\r\n\r\n\tupstream\techo\r\nidle-timeout 5m");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        await (await Given.Client(proxy)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task Checking_a_good_file_starts_nothing()
    {
        int port = Given.FreePorts(1);
        string file = Given.Write("tcpproxy.conf", $"listen 127.0.0.1:{port}\nupstream nosuch.invalid:80\n");
        Outcome outcome = await Tool.Proxy("-c", file, "--check-config");
        Assert.True(outcome.Status == 0, outcome.Err);
        Assert.Equal(string.Empty, outcome.Err);
    }

    [Theory(Timeout = Quick)]
    [InlineData("listen 127.0.0.1:0\nupstream echo\nidle-timeout banana\n", 3, "idle-timeout: ", "banana")]
    [InlineData("\n\nidel-timeout 5s\n", 3, "idel-timeout: unknown option", "did you mean \'idle-timeout\'?")]
    [InlineData("listen 127.0.0.1:0\nupstream nonsense\n", 2, "upstream: ", "nonsense")]
    [InlineData("listen 127.0.0.1:0\n\nlisten 127.0.0.1:0\nupstream echo\n", 1, "listen", "upstream")]
    [InlineData("listen\n", 1, "listen: ", "value")]
    [InlineData("listen 127.0.0.1:0\nupstream echo\nonce yes\n", 3, "once: ", "value")]
    [InlineData("listen 127.0.0.1:0\nupstream echo\nname \"open\n", 3, "quote", "")]
    [InlineData("--listen 127.0.0.1:0\n", 1, "--listen", "")]
    [InlineData("config other.conf\n", 1, "config", "")]
    [InlineData("help\n", 1, "help", "")]
    public async Task A_mistake_is_answered_with_file_and_line(
        string text, int line, string what, string more)
    {
        string file = Given.Write("bad.conf", text);
        foreach (string[] words in new string[][] { ["-c", file], ["-c", file, "--check-config"] })
        {
            Outcome outcome = await Tool.Proxy(words);
            string said = Assert.Single(outcome.ErrLines);
            Assert.StartsWith($"tcpproxy: error: {file}:{line}: ", said, StringComparison.Ordinal);
            Assert.Contains(what, said, StringComparison.Ordinal);
            Assert.Contains(more, said, StringComparison.Ordinal);
            Assert.Equal((2, string.Empty), (outcome.Status, outcome.Out));
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Binary_rubbish_is_a_mistake_not_a_crash()
    {
        string file = Given.Path("rubbish");
        byte[] rubbish = new byte[100_000];
        new Random(7).NextBytes(rubbish);
        File.WriteAllBytes(file, rubbish);
        Outcome outcome = await Tool.Proxy("-c", file);
        string line = Assert.Single(outcome.ErrLines);
        Assert.StartsWith($"tcpproxy: error: {file}:", line, StringComparison.Ordinal);
        Assert.DoesNotContain(line, char.IsControl);
        Assert.InRange(line.Length, 1, 1_000);
        Assert.Equal(2, outcome.Status);
    }

    [Fact(Timeout = Quick)]
    public async Task A_directory_is_no_configuration()
    {
        Outcome directory = await Tool.Proxy("-c", Given.Folder);
        Assert.Contains(Given.Folder, Assert.Single(directory.ErrLines), StringComparison.Ordinal);
        Assert.Equal(2, directory.Status);
    }

    [Theory(Timeout = Quick)]
    [InlineData("# nothing\n")]
    [InlineData("upstream echo\n")]
    [InlineData("listen 127.0.0.1:0\n")]
    public async Task A_file_that_lacks_something_is_named(string text)
    {
        Outcome lacking = await Tool.Proxy("-c", Given.Write("lacking.conf", text));
        Assert.Contains("lacking.conf", Assert.Single(lacking.ErrLines), StringComparison.Ordinal);
        Assert.Equal(2, lacking.Status);
    }

    [Fact(Timeout = Quick)]
    public async Task Many_routes_stand_on_one_command_line()
    {
        Upstream a = Given.Named("first");
        Upstream b = Given.Named("second");
        Upstream third = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(
            "--max-bytes-down", "2",
            "-l", "127.0.0.1:0", "-u", a.Address, "--name", "first",
            "-l", "127.0.0.1:0", "-u", b.Address, "--max-bytes-down", "off",
            "--listen", "127.0.0.1:0", $"--upstream={third.Address}");
        Assert.Equal(3, proxy.Addresses.Count);
        Assert.Equal("fi", Encoding.ASCII.GetString(await (await Given.Client(proxy, 0)).ReceiveToEnd()));
        Assert.Equal("second", await (await Given.Client(proxy, 1)).ReceiveLine());
        Peer echo = await Given.Client(proxy, 2);
        await echo.Send("hello");
        Assert.Equal("he", Encoding.ASCII.GetString(await echo.ReceiveToEnd()));
        List<LogLine> listening = await proxy.LinesOf("listening", 3);
        Assert.Equal(["first", "127.0.0.1:0", "127.0.0.1:0"], listening.Select(l => l["route"]));
        Assert.Equal(proxy.Addresses, listening.Select(l => l["listen"]));
    }
}
