using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--dump as its reader sees it.</summary>
public sealed class DumpEndToEndTests : EndToEndTest
{
    /// <summary>What each side says in turn.</summary>
    private static readonly byte[][] Lines =
        ["GET / HTTP/1.0\r\n\r\n"u8.ToArray(), "HTTP/1.0 200 OK\r\n\r\n\ttab \\ \"\n"u8.ToArray(), "\n"u8.ToArray(), "a\nb\n\n"u8.ToArray()];

    private static readonly byte[][] Bytes =
    [
        [.. Enumerable.Range(0, 256).Select(i => (byte)i)], [0, 255, 10, 13, 7, 8, 9, 11, 12, 27, 127, 128],
        "no end of line"u8.ToArray(), [.. Enumerable.Range(0, 8000).Select(i => (byte)(i * 7))],
    ];

    [Theory(Timeout = Quick)]
    [InlineData("text", "-v", false)]
    [InlineData("hex", "-x", false)]
    [InlineData("text", "-v", true)]
    [InlineData("hex", "-x", true)]
    public async Task A_conversation_is_shown_as_socat_shows_it(string format, string option, bool isBinary)
    {
        string socat = Tool.Need("socat", "socat");
        byte[][] turns = isBinary ? Bytes : Lines;
        Upstream upstream = Given.Server();
        int port = Given.FreePorts(1);
        Tool.Background(Given, "/bin/sh", "-c",
            $"exec {socat} {option} TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr TCP:{upstream.Address} 2>{Given.Path("socat")}");
        Peer? client = null;
        await Wait.Until(() => TryConnect(port, out client), "socat to listen");
        await Talk(Given.Client(client!), await upstream.Accept(), turns);

        ProxyProcess proxy = await Given.Proxy(ToFile("ours"), "--drain-timeout", "100ms", "127.0.0.1:0", upstream.Address, "--log", "off", "--dump", format);
        Peer other = await Given.Client(proxy);
        await Talk(other, await upstream.Accept(), turns);
        await proxy.Stop();

        // ours always ends a block's last line: so that a line of the log can follow
        string expected = Regex.Replace(Times(File.ReadAllText(Given.Path("socat"), Encoding.Latin1)), @"(?<=[^\n])(?=[<>] T  length)", "\n");
        expected = expected.EndsWith('\n') ? expected : expected + "\n";
        Assert.Equal(expected, Times(File.ReadAllText(Given.Path("ours"), Encoding.Latin1)));
        Assert.Equal(4, Regex.Count(expected, "^[<>] T  length=", RegexOptions.Multiline));
    }

    [Fact(Timeout = Quick)]
    public async Task Lines_of_the_log_and_blocks_do_not_tear_each_other()
    {
        const int Clients = 50;
        const int Rounds = 20;
        ProxyProcess proxy = await Given.Proxy(ToFile("err"), "127.0.0.1:0", "echo", "-v", "--dump", "text");
        await Wait.Many(Clients, 16, async i =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            for (int round = 0; round < Rounds; round++)
            {
                await client.Ask($"client {i} says {new string('x', i * 10)}\nin round {round}");
            }

            client.Finish();
            await client.ExpectEnd();
        });
        await proxy.Stop();
        (List<LogLine> lines, List<(char Mark, int Length, string Text)> blocks) = Parse(File.ReadAllText(Given.Path("err"), Encoding.Latin1));
        Assert.Equal(Clients, lines.Count(l => l.Event == "connection"));
        Assert.Equal(Clients, lines.Count(l => l.Event == "accepted"));
        Assert.All(blocks, b => Assert.Matches(@"^client \d+ says x*\nin round \d+$", b.Text));
        Assert.Equal(lines.Where(l => l.Event == "connection").Sum(l => l.BytesUp), blocks.Where(b => b.Mark == '>').Sum(b => b.Length));
        Assert.Equal(lines.Where(l => l.Event == "connection").Sum(l => l.BytesDown), blocks.Where(b => b.Mark == '<').Sum(b => b.Length));
    }

    [Fact(Timeout = Quick)]
    public async Task The_dump_is_on_stderr_when_the_log_is_in_a_file()
    {
        string log = Given.Path("log");
        ProxyProcess proxy = await Given.Proxy(ToFile("err"), "--drain-timeout", "100ms", "127.0.0.1:0", "echo", "--log-file", log, "--dump", "hex");
        Peer client = await Given.Client(proxy);
        await client.Ask("abc");
        client.Finish();
        await client.ExpectEnd();
        await proxy.Stop();
        Assert.Equal("> T  length=3 from=0 to=2\n 61 62 63\n< T  length=3 from=0 to=2\n 61 62 63\n", Times(File.ReadAllText(Given.Path("err"))));
        Assert.All(File.ReadAllLines(log), l => LogLine.Parse(l));
    }

    [Fact(Timeout = Quick)]
    public async Task A_limit_holds_for_both_directions_together_and_is_said_once()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            ToFile("err"), "--drain-timeout", "100ms", "127.0.0.1:0", upstream.Address, "--log", "off", "--dump", "text", "--dump-limit", "10");
        string expected = "";
        for (int i = 0; i < 2; i++)
        {
            (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
            await client.Exchange(server, "123456", "1234"); // exactly as much, which is nothing left out
            expected += "> T  length=6 from=0 to=5\n123456\n< T  length=4 from=0 to=3\n1234\n";
            await client.Exchange(server, "more", "and more");
            expected += $"-- the rest of {client.Local} is left out: --dump-limit\n";
            await client.Exchange(server, "more", "and more");
        }

        (Peer last, Peer lastServer) = await Given.Bridge(proxy, upstream);
        await last.Exchange(lastServer, "1234567", "1234567");
        expected += $"> T  length=7 from=0 to=6\n1234567\n< T  length=3 from=0 to=2\n123\n-- the rest of {last.Local} is left out: --dump-limit\n";
        last.Dispose();
        await proxy.Stop();
        Assert.Equal(expected, Times(File.ReadAllText(Given.Path("err"))));
    }

    [Theory(Timeout = Quick)]
    [InlineData("env -u NO_COLOR", true)]
    [InlineData("env NO_COLOR=", true)]
    [InlineData("env NO_COLOR=1", false)]
    public async Task A_terminal_gets_colours_unless_its_user_wants_none(string environment, bool isColoured)
    {
        Tool.NeedLibc("whether it is a terminal is not asked");
        string script = Tool.Need("script", "bsdutils");
        int port = Given.FreePorts(1);
        Task<Outcome> shown = Tool.Run(script, "-qec",
            $"{environment} {ProxyProcess.Binary} 127.0.0.1:{port} echo --once --log off --dump text", "/dev/null");
        Peer? client = null;
        await Wait.Until(() => TryConnect(port, out client), "the proxy to listen");
        await Given.Client(client!).Ask("hello");
        client!.Finish();
        await client.ExpectEnd();
        string expected = isColoured
            ? "\u001b[36m> T  length=5 from=0 to=4\nhello\n\u001b[m\u001b[33m< T  length=5 from=0 to=4\nhello\n\u001b[m"
            : "> T  length=5 from=0 to=4\nhello\n< T  length=5 from=0 to=4\nhello\n";
        Assert.Equal(expected, Times((await shown).Good()).Replace("\r\n", "\n", StringComparison.Ordinal));
    }

    [Theory(Timeout = Slow)]
    [InlineData("text")]
    [InlineData("json")]
    [InlineData("off")]
    public async Task A_stderr_that_nobody_reads_holds_up_nobody_and_what_it_missed_is_counted(string log)
    {
        const int Length = 32 << 20;
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            new Launch { ReadLog = false, Chatter = ["> ", "< ", " "] }, "127.0.0.1:0", upstream.Address, "--dump", "hex", "--log", log);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        Task sending = client.Send(new Pattern(1), Length);
        await server.Receive(new Pattern(1), Length);
        await sending;
        Assert.True(proxy.Resident < 100 << 20, $"{proxy.Resident} bytes resident");

        proxy.StartReading();
        proxy.Tolerate("log");
        await proxy.Line("log");
        int rounds = 0;
        for (; !proxy.RawLog.Contains(" 61 67 61 69 6e", StringComparison.Ordinal); rounds++)
        {
            Assert.True(rounds < 100, "nothing is shown any more");
            await client.Exchange(server, "again", "");
            await Wait.Pause(50);
        }

        client.Dispose();
        server.Dispose();
        Assert.Equal(0, await proxy.Stop());
        long shown = Regex.Matches(proxy.RawLog, @"^> .* length=(\d+) ", RegexOptions.Multiline).Sum(m => Number(m.Groups[1]));
        long missed = proxy.Lines.Where(l => l.Event == "log").Sum(
            l => Number(Regex.Match(l["message"], @"^0 lines and (\d+) bytes of --dump dropped: ").Groups[1]));
        Assert.Equal(Length + (5 * rounds), shown + missed);
    }

    [Fact(Timeout = Quick)]
    public async Task What_was_read_before_the_server_was_chosen_is_shown_too_but_no_header()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            ToFile("err"), "--drain-timeout", "100ms", "-l", "127.0.0.1:0", "--log", "off", "--accept-proxy", "127.0.0.1", "--sni", "www.example.com", "-u", upstream.Address,
            "--dump", "hex");
        byte[] hello = Hello.Make("www.example.com");
        Peer client = await Given.Client(proxy);
        await client.Send((byte[])[.. "PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n"u8, .. hello]);
        Peer server = await upstream.Accept();
        Assert.Equal(hello, await server.Receive(hello.Length));
        await client.Exchange(server, "x", "y");
        client.Dispose();
        await proxy.Stop();
        string first = $"> T  length={hello.Length} from=0 to={hello.Length - 1}\n{string.Concat(hello.Select(b => $" {b:x2}"))}\n";
        Assert.Equal(
            $"{first}> T  length=1 from={hello.Length} to={hello.Length}\n 78\n< T  length=1 from=0 to=0\n 79\n",
            Times(File.ReadAllText(Given.Path("err"))));
    }

    [Fact(Timeout = Quick)]
    public async Task Other_routes_are_not_shown()
    {
        ProxyProcess proxy = await Given.Proxy(
            ToFile("err"), "--drain-timeout", "100ms", "--log", "off", "-l", "127.0.0.1:0", "-u", "echo", "--dump", "text", "-l", "127.0.0.1:0", "-u", "echo");
        await (await Given.Client(proxy, 1)).Ask("not shown");
        await (await Given.Client(proxy, 0)).Ask("shown");
        await proxy.Stop();
        Assert.Equal("> T  length=5 from=0 to=4\nshown\n< T  length=5 from=0 to=4\nshown\n", Times(File.ReadAllText(Given.Path("err"))));
    }

    private static long Number(Group group) => long.Parse(group.Value, CultureInfo.InvariantCulture);

    private static string Times(string text) => Regex.Replace(text, @"(?<=[<>] )\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d+(?=  length)", "T");

    private static bool TryConnect(int port, out Peer? client)
    {
        try
        {
            client = Peer.Connect(new IPEndPoint(IPAddress.Loopback, port)).GetAwaiter().GetResult();
            return true;
        }
        catch (System.Net.Sockets.SocketException)
        {
            client = null;
            return false;
        }
    }

    private static async Task Talk(Peer client, Peer server, byte[][] turns)
    {
        for (int i = 0; i < turns.Length; i++)
        {
            await (i % 2 == 0 ? client : server).Send(turns[i]);
            Assert.Equal(turns[i], await (i % 2 == 0 ? server : client).Receive(turns[i].Length));
        }

        client.Finish();
        await server.ExpectEnd();
        server.Dispose();
        await client.ExpectEnd();
        client.Dispose();
    }

    /// <summary>Every byte of it is a log line, or a block of as many bytes as it says.</summary>
    private static (List<LogLine> Lines, List<(char Mark, int Length, string Text)> Blocks) Parse(string text)
    {
        List<LogLine> lines = [];
        List<(char, int, string)> blocks = [];
        for (int at = 0; at < text.Length;)
        {
            int end = text.IndexOf('\n', at);
            Assert.True(end >= 0, $"a line without an end: {text[at..]}");
            string line = text[at..end];
            at = end + 1;
            if (line[0] is not ('>' or '<'))
            {
                lines.Add(LogLine.Parse(line));
                continue;
            }

            Match head = Regex.Match(line, @"^[<>] [\d/]{10} [\d:.]{15}  length=(\d+) from=\d+ to=\d+$");
            Assert.True(head.Success, line);
            int length = (int)Number(head.Groups[1]);
            blocks.Add((line[0], length, text.Substring(at, length)));
            at += length;
            Assert.Equal('\n', text[at++]);
        }

        return (lines, blocks);
    }

    private Launch ToFile(string name) => Launch.FromShell(streams: $"2>{Given.Path(name)}");
}
