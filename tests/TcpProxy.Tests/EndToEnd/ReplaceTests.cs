using System;
using System.Globalization;
using System.Linq;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--replace-up, --replace-down, --block-up and --block-down on the native binary.</summary>
public sealed class ReplaceTests : EndToEndTest
{
    private const string To = "127.0.0.1:0";

    [Fact(Timeout = Quick)]
    public async Task Each_direction_has_its_own_replacements_of_any_length()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            To, upstream.Address, "--replace-up", "hello=>good morning", "--replace-down", "\\x00\\xff\\n=>", "--replace-up", "=\\x3d>=>\\x00");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Send("hello hello, ==>\0\u00ff\n");
        await server.ReceiveText("good morning good morning, \0\0\u00ff\n");
        await server.Send(new byte[] { 1, 0, 0xff, 10, 2, 0xff });
        await server.Send("hello");
        Assert.Equal([1, 2, 0xff, .. "hello"u8], await client.Receive(8));
        client.Finish();
        server.Finish();
        await client.ExpectEnd();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("--", 20L, 11L), (line.End, line.BytesUp, line.BytesDown)); // received, not sent
    }

    [Fact(Timeout = Quick)]
    public async Task What_is_cut_anywhere_is_found()
    {
        const string Text = "x needneedle needleles y";
        ProxyProcess proxy = await Given.Proxy(To, "echo", "--replace-up", "needle=>pin", "--replace-up", "need=>?", "--replace-up", "les=>!");
        await Task.WhenAll(Enumerable.Range(0, Text.Length).Select(Cut));

        Task Cut(int at) => InTime("x ?pin pin! y", async () =>
        {
            Peer client = await Given.Client(proxy);
            await client.Send(Text[..at]);
            await Wait.Pause(5);
            await client.Send(Text[at..]);
            client.Finish();
            return Encoding.UTF8.GetString(await client.ReceiveToEnd());
        });
    }

    [Fact(Timeout = Quick)]
    public async Task What_comes_byte_by_byte_is_found()
    {
        const string Text = "a needle, an needneedle and a nee";
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(To, upstream.Address, "--replace-up", "needle=>pin");
        await InTime("a pin, an needpin and a nee", async () =>
        {
            (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
            foreach (char c in Text)
            {
                await client.Send($"{c}");
                await Wait.Pause(1);
            }

            client.Finish(); // and what is held then goes with the FIN
            string got = Encoding.UTF8.GetString(await server.ReceiveToEnd());
            await server.Send("still here");
            server.Finish();
            Assert.Equal("still here", Encoding.UTF8.GetString(await client.ReceiveToEnd()));
            return got;
        });
    }

    [Fact(Timeout = Quick)]
    public async Task What_may_become_a_match_waits_100_ms_and_then_is_none()
    {
        // by the built-in echo the bytes pass the taps of both directions, one behind the other
        ProxyProcess proxy = await Given.Proxy(To, "echo", "--replace-down", "needle=>pin", "--replace-up", "1=>2");
        Peer client = await Given.Client(proxy);
        long start = Environment.TickCount64;
        await client.Send("1 need");
        await client.ReceiveText("2 need");
        Assert.InRange(Environment.TickCount64 - start, 95, 10_000);
        await client.Send("le needle");
        await client.ReceiveText("le pin");
    }

    [Fact(Timeout = Quick)]
    public async Task Echo_passes_both_directions_and_each_tap_works_on_the_result_of_the_one_before()
    {
        ProxyProcess proxy = await Given.Proxy(
            To, "echo", "--replace-down", "c=>d", "--replace-up", "a=>b", "--replace-up", "b=>c", "--replace-down", "d=>e");
        Peer client = await Given.Client(proxy);
        await client.Send("abcde\n");
        await client.ReceiveText("bddee\n");
    }

    [Theory(Timeout = Quick)]
    [InlineData(true)]
    [InlineData(false)]
    public async Task Nothing_of_a_blocked_pattern_arrives_and_both_sides_are_reset(bool isUp)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(To, upstream.Address, isUp ? "--block-up" : "--block-down", "DROP \"x\"\\x00");
        await InTime("", async () => // but for what has waited 100 ms for the next byte of this test
        {
            (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
            (Peer from, Peer to) = isUp ? (client, server) : (server, client);
            await from.Send("SELECT 1; DROP");
            await to.ReceiveText("SELECT 1; ");
            foreach (byte b in " \"x\"\0"u8.ToArray())
            {
                await from.Send(new[] { b });
            }

            (byte[] data, SocketError error) = await to.Drain();
            Assert.Equal(SocketError.ConnectionReset, error);
            await from.ExpectReset();
            LogLine line = await proxy.Connection(client);
            Assert.Equal(("PD", "blocked by 'DROP \"x\"\\x00' at byte 10"), (line.End, line.Reason));
            Assert.DoesNotContain(line.Raw, char.IsControl);
            return Encoding.UTF8.GetString(data);
        });
    }

    [Fact(Timeout = Quick)]
    public async Task A_block_that_waits_for_a_longer_pattern_does_not_wait_for_ever()
    {
        ProxyProcess proxy = await Given.Proxy(To, "echo", "--block-down", "abc", "--block-down", "ab");
        Peer client = await Given.Client(proxy);
        await client.Send("-ab");
        (byte[] data, SocketError error) = await client.Drain();
        Assert.Equal(("-", SocketError.ConnectionReset), (Encoding.UTF8.GetString(data), error));
        Assert.Equal("blocked by 'ab' at byte 1", (await proxy.Connection(client)).Reason);
    }

    [Fact(Timeout = Quick)]
    public async Task What_was_read_before_there_was_a_server_is_replaced_and_blocked_too()
    {
        ProxyProcess proxy = await Given.Proxy(
            To, "echo", "--accept-proxy", "127.0.0.1", "--replace-up", "old=>new", "--block-up", "TCP4", "--block-up", "bad");
        Peer client = await Given.Client(proxy);
        await client.Send("PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\nold bytes");
        await client.ReceiveText("new bytes");
        Peer other = await Given.Client(proxy);
        await other.Send("PROXY TCP4 10.0.0.1 10.0.0.2 3 2\r\nbad bytes");
        await other.ExpectReset();
        Assert.Equal("blocked by 'bad' at byte 0", (await proxy.Connection("10.0.0.1:3")).Reason);
    }

    [Fact(Timeout = Quick)]
    public async Task A_route_of_a_file_has_its_own_and_the_others_none()
    {
        string file = Given.Write(
            "conf", $"replace-down \"a => #\"\nlisten {To}\nupstream echo\nreplace-up b=>c\nlisten {To}\nupstream echo\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        Peer first = await Given.Client(proxy, 0);
        await first.Send("a b a.\n");
        await first.ReceiveText(" #c a.\n");
        Peer second = await Given.Client(proxy, 1);
        await second.Send("a b a.\n");
        await second.ReceiveText(" #b a.\n");
    }

    [Fact(Timeout = Slow)]
    public async Task A_hundred_megabytes_with_a_few_matches_arrive_as_expected()
    {
        const int Block = 1 << 20;
        const int Blocks = 100;
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            To, upstream.Address, "--replace-up", "needle\\0=>PIN", "--replace-up", "haystack!=>hay and stack", "--replace-up", "\\x00never!=>");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        Random random = new(6);
        byte[] block = new byte[Block];
        using IncrementalHash expected = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        using IncrementalHash got = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        long length = 0;
        Task<long> receiving = Wait.Apart(Receive);
        for (int i = 0; i < Blocks; i++)
        {
            random.NextBytes(block);
            int at = random.Next(Block - 10);
            byte[] old = i % 2 == 0 ? [.. "needle\0"u8] : [.. "haystack!"u8];
            byte[] replacement = i % 2 == 0 ? [.. "PIN"u8] : [.. "hay and stack"u8];
            old.CopyTo(block, at);
            expected.AppendData(block.AsSpan(0, at));
            expected.AppendData(replacement);
            expected.AppendData(block.AsSpan(at + old.Length));
            length += Block - old.Length + replacement.Length;
            await client.Send(block);
        }

        client.Finish();
        Assert.Equal(length, await receiving);
        Assert.Equal(Convert.ToHexString(expected.GetHashAndReset()), Convert.ToHexString(got.GetHashAndReset()));

        async Task<long> Receive()
        {
            byte[] buffer = new byte[Block];
            long all = 0;
            for (int count; (count = await server.ReceiveSome(buffer)) > 0; all += count)
            {
                got.AppendData(buffer.AsSpan(0, count));
            }

            return all;
        }
    }

    [Fact(Timeout = Slow)]
    public async Task Redis_through_a_replacement_of_the_same_length()
    {
        string server = Tool.Need("redis-server", "redis-server");
        string cli = Tool.Need("redis-cli", "redis-tools");
        int port = Given.FreePorts(1);
        Tool.Background(Given, server, "--port", Text(port), "--bind", "127.0.0.1", "--save", "", "--dir", Given.Folder);
        await RealProgramsTests.WaitForPort(port);
        ProxyProcess proxy = await Given.Proxy(
            To, $"127.0.0.1:{Text(port)}", "--replace-up", "alpha=>gamma", "--replace-down", "secret=>******", "--block-up", "FLUSHALL\\r\\n");
        string[] direct = ["-h", "127.0.0.1", "-p", Text(port)];
        string[] through = ["-h", "127.0.0.1", "-p", Text(proxy.Port)];
        Assert.Equal("OK\n", (await Tool.Run(cli, [.. through, "set", "k", "alphabet"])).Good());
        Assert.Equal("gammabet\n", (await Tool.Run(cli, [.. direct, "get", "k"])).Good());
        Assert.Equal("OK\n", (await Tool.Run(cli, [.. direct, "set", "k", "my secret"])).Good());
        Assert.Equal("my ******\n", (await Tool.Run(cli, [.. through, "get", "k"])).Good());
        string many = string.Concat(Enumerable.Range(0, 20_000).Select(i => $"SET alpha{i} alpha{i}\r\n"));
        string piped = (await Tool.Run(cli, [.. through, "--pipe"], 60, input: many)).Good();
        Assert.Contains("errors: 0, replies: 20000", piped, StringComparison.Ordinal);
        Assert.Equal("gamma19999\n", (await Tool.Run(cli, [.. direct, "get", "gamma19999"])).Good());
        await Tool.Run(cli, [.. through, "FLUSHALL"]);
        Assert.Equal("20001\n", (await Tool.Run(cli, [.. direct, "dbsize"])).Good());
        Assert.Equal("PD", (await proxy.Connection(line => line.Reason.Contains("FLUSHALL", StringComparison.Ordinal))).End);
    }

    [Fact(Timeout = Slow)]
    public async Task Headers_of_http_between_curl_and_nginx()
    {
        string curl = Tool.Need("curl", "curl");
        string nginx = Tool.Need("nginx", "nginx");
        int port = Given.FreePorts(1);
        string configuration = Given.Write(
            "nginx.conf",
            $$"""
            daemon off; pid {{Given.Path("nginx.pid")}}; error_log stderr; {{(Tool.IsRoot ? "user root;" : "")}}
            events { worker_connections 64; }
            http {
              access_log off;
              client_body_temp_path {{Given.Path("body")}}; proxy_temp_path {{Given.Path("proxy")}};
              fastcgi_temp_path {{Given.Path("fcgi")}}; uwsgi_temp_path {{Given.Path("uwsgi")}}; scgi_temp_path {{Given.Path("scgi")}};
              server {
                listen 127.0.0.1:{{port}};
                location / { add_header X-Seen $http_host; return 200 "agent $http_user_agent\n"; }
              }
            }
            """);
        Tool.Background(Given, nginx, "-p", Given.Folder, "-c", configuration);
        await RealProgramsTests.WaitForPort(port);
        ProxyProcess proxy = await Given.Proxy(
            To, $"127.0.0.1:{Text(port)}", "--replace-up", $"Host: 127.0.0.1=>Host: www.example.com", "--replace-up",
            "\\r\\nUser-Agent: curl=>\\r\\nX-Added: yes\\r\\nUser-Agent: some browser", "--replace-down", "Server: nginx=>Server: hidden");
        string answer = (await Tool.Run(curl, "-sSi", "--fail", $"http://127.0.0.1:{Text(proxy.Port)}/")).Good();
        Assert.Contains("X-Seen: www.example.com", answer, StringComparison.Ordinal);
        Assert.Contains("\nagent some browser/", answer, StringComparison.Ordinal);
        Assert.Contains("Server: hidden", answer, StringComparison.Ordinal);
        Assert.DoesNotContain("nginx", answer, StringComparison.Ordinal);
    }

    [Theory(Timeout = Quick)]
    [InlineData("--replace-up", "=>x", "nothing to look for")]
    [InlineData("--replace-down", "abc", "write OLD=>NEW")]
    [InlineData("--replace-up", "a=>\\q", "a backslash stands before")]
    [InlineData("--block-up", "", "nothing to look for")]
    [InlineData("--block-down", "\\x", "a backslash stands before")]
    public async Task A_wrong_pattern_gets_one_line(string option, string value, string words)
    {
        Outcome outcome = await Tool.Proxy(To, "echo", $"{option}={value}");
        string line = Assert.Single(outcome.ErrLines);
        Assert.StartsWith($"tcpproxy: error: {option}: ", line, StringComparison.Ordinal);
        Assert.Contains(words, line, StringComparison.Ordinal);
        Assert.Equal(2, outcome.Status);
    }

    /// <summary>On a machine that stalls for 100 ms in the middle of a match there is rightly none: that is tried again.</summary>
    private static async Task InTime(string expected, Func<Task<string>> attempt)
    {
        string got = await attempt();
        for (int i = 0; i < 4 && got != expected; i++)
        {
            got = await attempt();
        }

        Assert.Equal(expected, got);
    }

    private static string Text(int number) => number.ToString(CultureInfo.InvariantCulture);
}
