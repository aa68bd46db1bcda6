using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Text.Json;
using System.Text.RegularExpressions;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class LoggingTests : EndToEndTest
{
    private static readonly string[] Keys =
    [
        "time", "level", "event", "route", "client", "upstream", "server", "connect_ms", "duration_ms",
        "bytes_up", "bytes_down", "end", "reason",
    ];

    [Theory(Timeout = Quick)]
    [InlineData("text")]
    [InlineData("json")]
    public async Task A_connection_is_one_line_with_all_there_is_to_know(string format)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", $"localhost:{upstream.Port}", "--log", format, "--name", "my route");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        DateTimeOffset start = DateTimeOffset.UtcNow;
        await client.Exchange(server, "12345", "1234567");
        await Wait.Pause(500);
        client.Finish();
        await server.ExpectEnd();
        server.Finish();
        await client.ExpectEnd();

        LogLine line = await proxy.Connection(client);
        Assert.Equal(Keys, line.Keys);
        Assert.Equal(format == "json", line.Raw.StartsWith('{'));
        DateTimeOffset time = DateTimeOffset.ParseExact(
            line["time"],
            "yyyy-MM-dd'T'HH:mm:ss.fff'Z'",
            CultureInfo.InvariantCulture,
            DateTimeStyles.AssumeUniversal);
        Assert.InRange(time, start.AddSeconds(-1), DateTimeOffset.UtcNow.AddSeconds(1));
        Assert.Equal(("info", "connection", "my route"), (line.Level, line.Event, line["route"]));
        Assert.Equal((client.Local, $"localhost:{upstream.Port}"), (line["client"], line["upstream"]));
        Assert.Equal(upstream.Address, line["server"]);
        Assert.InRange(line.Number("connect_ms"), 0, 2_000);
        Assert.InRange(line.Number("duration_ms"), 450, 5_000);
        Assert.Equal((5, 7, "--", "done"), (line.BytesUp, line.BytesDown, line.End, line.Reason));
        if (format == "json")
        {
            using JsonDocument document = JsonDocument.Parse(line.Raw);
            Assert.All(
                new[] { "connect_ms", "duration_ms", "bytes_up", "bytes_down" },
                key => Assert.Equal(JsonValueKind.Number, document.RootElement.GetProperty(key).ValueKind));
        }
    }

    [Theory(Timeout = Quick)]
    [InlineData("text")]
    [InlineData("json")]
    public async Task A_failed_connection_has_the_same_keys(string format)
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", $"127.0.0.1:{Given.RefusingPort()}", "--log", format);
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(Keys, line.Keys);
        Assert.Equal(("-", -1), (line["server"], line.Number("connect_ms")));
    }

    [Fact(Timeout = Quick)]
    public async Task The_life_of_the_proxy_is_logged()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        LogLine listening = await proxy.Line("listening");
        Assert.Equal(["time", "level", "event", "route", "listen", "upstream"], listening.Keys.Take(6));
        Assert.Equal((proxy.Addresses[0], upstream.Address), (listening["listen"], listening["upstream"]));
        Assert.Equal("127.0.0.1:0", listening["route"]);
        Assert.Equal(0, await proxy.Stop());
        Assert.Equal(0, (await proxy.Line("draining")).Number("connections"));
        await proxy.Line("stopped");
        Assert.Equal(["listening", "draining", "stopped"], proxy.Lines.Select(l => l.Event));
    }

    [Fact(Timeout = Quick)]
    public async Task Quiet_leaves_only_what_is_wrong()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "-q");
        await Converse(proxy);
        Assert.Equal(0, await proxy.Stop());
        Assert.Equal(string.Empty, proxy.RawLog);
    }

    [Fact(Timeout = Quick)]
    public async Task Verbose_says_more()
    {
        Upstream upstream = Given.Echo();
        Names names = await Names.Hosts(Given, "127.0.0.1 server.example");
        ProxyProcess proxy = await Given.Proxy(
            names.Launch, "127.0.0.1:0", $"server.example:{upstream.Port}", "-v");
        await Converse(proxy);
        await proxy.Connection();
        Assert.Equal(0, await proxy.Stop());
        Assert.Contains(proxy.Lines, l => l.Level == "debug");
    }

    [Theory(Timeout = Quick)]
    [InlineData("--log", "off")]
    [InlineData("--log-level", "error")]
    public async Task The_log_can_be_off(string option, string value)
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, option, value);
        await Converse(proxy);
        Assert.Equal(0, await proxy.Stop());
        Assert.Equal(string.Empty, proxy.RawLog);
    }

    [Theory(Timeout = Quick)]
    [InlineData("text")]
    [InlineData("json")]
    public async Task What_people_type_is_escaped(string format)
    {
        const string Name = "a \"quoted\" = name\nlevel=error event=fake \\ \u001b[31m \u00e9 \ud83d\ude00";
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--name", Name, "--log", format);
        await Converse(proxy);
        LogLine line = await proxy.Connection();
        Assert.Equal(Name, line["route"]);
        Assert.DoesNotContain(line.Raw, char.IsControl);
    }

    [Theory(Timeout = Quick)]
    [InlineData("2>&-")]
    [InlineData("<&- >&- 2>&-")]
    [InlineData("2>/dev/full")]
    public async Task Without_a_stderr_to_write_to_it_serves_all_the_same(string streams)
    {
        Tool.NeedLibc("whose descriptor it is cannot be asked");
        // a descriptor of that number may belong to somebody else by then: nothing may be written to it
        Launch launch = Launch.FromShell(streams: streams);
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", upstream.Address);
        for (int i = 0; i < 20; i++)
        {
            await Converse(proxy);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_log_whose_reader_has_gone_stops_nobody()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(
            new Launch { ReadLog = false }, "127.0.0.1:0", upstream.Address);
        proxy.CloseLog();
        for (int i = 0; i < 20; i++)
        {
            await Converse(proxy);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_log_file_that_is_full_stops_nobody()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--log-file", "/dev/full");
        await Converse(proxy);
    }

    [Theory(Timeout = Quick)]
    [InlineData("--log-file")]
    [InlineData("--pid-file")]
    public async Task A_file_that_cannot_be_written_is_an_error_and_nothing_is_left(string option)
    {
        string ports = Given.Path("ports");
        string socket = Given.Path("front.sock");
        Outcome outcome = await Tool.Proxy(
            "--port-file", ports, $"unix:{socket}", "echo", "-q", option, "/nonexistent/file");
        string line = Assert.Single(outcome.ErrLines);
        Assert.StartsWith("tcpproxy: error: ", line, StringComparison.Ordinal);
        Assert.Contains("/nonexistent/file", line, StringComparison.Ordinal);
        Assert.Equal(1, outcome.Status);
        Assert.Empty(Directory.GetFileSystemEntries(Given.Folder));
    }

    [Fact(Timeout = Quick)]
    public async Task A_log_file_takes_the_place_of_stderr_and_is_continued()
    {
        string file = Given.Path("proxy.log");
        Upstream upstream = Given.Echo();
        for (int run = 1; run <= 2; run++)
        {
            ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--log-file", file);
            await Converse(proxy);
            Assert.Equal(0, await proxy.Stop());
            Assert.Equal(string.Empty, proxy.RawLog);
            List<LogLine> lines = [.. File.ReadLines(file).Select(LogLine.Parse)];
            Assert.Equal(run, lines.Count(l => l.Event == "connection"));
            Assert.Equal("stopped", lines[^1].Event);
        }
    }

    private async Task Converse(ProxyProcess proxy)
    {
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
    }

    [Theory(Timeout = Quick)]
    [InlineData("--log-file", "")]
    [InlineData("--log-file", "trap '' XFSZ; ")]
    [InlineData("--pcap", "")]
    [InlineData("--pcap", "trap '' XFSZ; ")]
    public async Task A_file_that_may_not_grow_is_not_the_end(string option, string trap)
    {
        Tool.NeedLibc("files of the runtime would be too large");
        string file = Given.Path("file");
        ProxyProcess proxy = await Given.Proxy(Launch.FromShell($"{trap}ulimit -f 1"), "127.0.0.1:0", "echo", option, file);
        proxy.Tolerate("pcap");
        for (int i = 0; i < 20; i++)
        {
            await Converse(proxy);
        }

        if (option == "--pcap")
        {
            Assert.Equal($"the capture {file} has ended: file too large", (await proxy.Line("pcap"))["message"]);
        }

        Assert.Equal(0, await proxy.Stop());
        Assert.InRange(new FileInfo(file).Length, 1, 512);
    }

    [Fact(Timeout = Quick)]
    public async Task Lines_that_could_not_be_written_are_counted_and_said_and_tear_no_other()
    {
        const int Count = 40;
        const string Words = " dropped: the log could not be written";
        Tool.NeedLibc("files of the runtime would be too large");
        string prlimit = Tool.Need("prlimit", "util-linux");
        string curl = Tool.Need("curl", "curl");
        string file = Given.Path("file");
        string stats = $"127.0.0.1:{Given.FreePorts(1)}";
        ProxyProcess proxy = await Given.Proxy(
            Launch.FromShell("ulimit -S -f 4"), "127.0.0.1:0", "echo", "--log", "json", "--log-file", file, "--stats", stats);
        for (int i = 0; i < Count; i++)
        {
            await Converse(proxy);
        }

        await Wait.Until(() => Dropped() > 0, "lines to be dropped");
        (await Tool.Run(prlimit, "--pid", $"{proxy.Id}", "--fsize=unlimited")).Good();
        await Converse(proxy);
        await Wait.Until(() => File.ReadAllText(file).Contains(Words, StringComparison.Ordinal), "it to be said");
        long dropped = Dropped();
        Assert.Equal(0, await proxy.Stop());
        string[] lines = File.ReadAllLines(file);
        Assert.InRange(lines.Count(line => !line.StartsWith('{') || !line.EndsWith('}')), 0, 1); // the torn one
        Assert.Single(lines, line => line.Contains($"\"{dropped} line", StringComparison.Ordinal) && line.Contains(Words, StringComparison.Ordinal));
        Assert.Equal(Count + 1, dropped + lines.Count(line => line.Contains("\"event\":\"connection\"", StringComparison.Ordinal) && line.EndsWith('}')));

        long Dropped() => long.Parse(
            Regex.Match(Tool.Run(curl, "-s", $"http://{stats}/metrics").GetAwaiter().GetResult().Good(), @"\n\S*log_dropped\S* (\d+)").Groups[1].Value,
            CultureInfo.InvariantCulture);
    }

    [Fact(Timeout = Quick)]
    public async Task A_log_file_may_be_a_pipe()
    {
        string sh = Tool.Need("sh", "dash");
        string ports = Given.Path("ports");
        Outcome outcome = await Tool.Run(sh, "-c",
            $"{{ until [ -s {ports} ]; do sleep 0.05; done; kill -TERM $$; }} & "
                + $"exec \"$0\" 127.0.0.1:0 echo --log-file /dev/stdout --port-file {ports}", ProxyProcess.Binary);
        Assert.Equal((0, string.Empty), (outcome.Status, outcome.Err));
        Assert.Contains("event=listening", outcome.Out, StringComparison.Ordinal);
        Assert.Contains("event=stopped", outcome.Out, StringComparison.Ordinal);
    }
}
