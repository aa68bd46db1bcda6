using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>The formats and places of the log that other programs have a say in: HAProxy's line, syslog, logrotate.</summary>
public sealed class LogTests : EndToEndTest
{
    // RFC 5424, 6: HEADER of NILVALUEs or printable ASCII; TIME-SECFRAC has at most six digits; no structured data
    private static readonly Regex Message = new(
        """
        ^<(?<pri>0|[1-9]\d{0,2})>1 (?<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z) (?<host>[!-~]{1,255}) tcpproxy (?<pid>\d{1,128})
        """.Trim() + @" (?<id>[!-~]{1,32}) - (?<text>event=.+)$",
        RegexOptions.Singleline);

    private static readonly Regex Tcplog = new(
        """
        ^(?<ci>\S+):(?<cp>\d+) \[(?<t>\d\d/[A-Z][a-z][a-z]/\d{4}:\d\d:\d\d:\d\d\.\d{3})\] (?<ft>[^\s/]+) (?<b>[^\s/]+)/(?<s>[^\s/]+)
        """.Trim() + @" (?<Tw>-1|\d+)/(?<Tc>-1|\d+)/(?<Tt>\+?\d+) (?<B>\+?\d+) (?<ts>[A-Za-z-]{2})"
        + @" (?<ac>\d+)/(?<fc>\d+)/(?<bc>\d+)/(?<sc>\d+)/(?<rc>\+?\d+) (?<sq>\d+)/(?<bq>\d+)$");

    private volatile Task _mayAnswer = Task.CompletedTask;
    private int _asked;

    // ---- HAProxy's line

    [Fact(Timeout = Slow)]
    public async Task HAProxy_says_the_same_of_the_same_conversations()
    {
        const int Pace = 2000; // ms by which the same conversation may take longer on a busy machine
        string haproxy = Tool.Need("haproxy", "haproxy");
        Upstream upstream = Given.Server(AnswerLater);
        int refusing = Given.RefusingPort();
        int port = Given.FreePorts(6);
        string socket = Given.Path("ha.sock");
        string log = Given.Path("ha.log");
        string config = Given.Path("ha.cfg");
        File.WriteAllText(config, $"""
            global
              log stdout format raw local0
            defaults
              mode tcp
              log global
              option tcplog
              retries 0
              timeout connect 5s
              timeout client 10s
              timeout server 10s
            listen plain
              bind 127.0.0.1:{port}
              bind unix@{socket}
              server one 127.0.0.1:{upstream.Port}
            listen refused
              bind 127.0.0.1:{port + 1}
              server one 127.0.0.1:{refusing}
            listen retried
              bind 127.0.0.1:{port + 2}
              retries 1
              option redispatch 1
              balance roundrobin
              server one 127.0.0.1:{refusing}
              server two 127.0.0.1:{upstream.Port}
            listen queued
              bind 127.0.0.1:{port + 3}
              timeout queue 10s
              server one 127.0.0.1:{upstream.Port} maxconn 1
            listen late
              bind 127.0.0.1:{port + 4}
              timeout queue 100ms
              server one 127.0.0.1:{upstream.Port} maxconn 1
            listen long
              bind 127.0.0.1:{port + 5}
              option logasap
              server one 127.0.0.1:{upstream.Port}

            """);
        Tool.Background(Given, "/bin/sh", "-c", $"TZ=Asia/Tokyo exec {haproxy} -f {config} >{log}");
        string file = Given.Path("our.log");
        string ours = Given.Path("our.sock");
        ProxyProcess proxy = await Given.Proxy(
            new Launch { Environment = { ["TZ"] = "Asia/Tokyo" } },
            "--retries", "0", "--log", "haproxy", "--log-file", file, "--log-long", "200ms",
            "-l", "127.0.0.1:0", "--name", "plain", "-u", $"{upstream.Address} name=one",
            "-l", "127.0.0.1:0", "--name", "refused", "-u", $"127.0.0.1:{refusing} name=one",
            "-l", "127.0.0.1:0", "--name", "retried", "--retries", "1", "--balance", "roundrobin",
            "-u", $"127.0.0.1:{refusing} name=one", "-u", $"{upstream.Address} name=two",
            "-l", "127.0.0.1:0", "--name", "queued", "--queue", "5", "--queue-timeout", "10s",
            "-u", $"{upstream.Address} name=one max-connections=1",
            "-l", "127.0.0.1:0", "--name", "late", "--queue", "5", "--queue-timeout", "100ms",
            "-u", $"{upstream.Address} name=one max-connections=1",
            "-l", "127.0.0.1:0", "--name", "long", "-u", $"{upstream.Address} name=one",
            "-l", $"unix:{ours}", "--name", "plain", "-u", $"{upstream.Address} name=one");
        await Wait.Until(() => File.Exists(socket), "HAProxy");

        Dictionary<string, Match> theirs = await Converse(log, i => new IPEndPoint(IPAddress.Loopback, port + i), socket);
        Dictionary<string, Match> mine = await Converse(file, proxy.Endpoint, ours);
        foreach ((string which, Match their) in theirs)
        {
            Match my = mine[which];
            string both = $"{which}:\n{their.Value}\n{my.Value}";
            foreach (string field in new[] { "ci", "ft", "b", "s", "B", "ts", "ac", "fc", "bc", "sc", "rc", "sq", "bq" })
            {
                Assert.True(their.Groups[field].Value == my.Groups[field].Value, $"{field} of {both}");
            }

            foreach (string field in new[] { "Tw", "Tc", "Tt" })
            {
                Assert.True(their.Groups[field].Value.StartsWith('+') == my.Groups[field].Value.StartsWith('+'), both);
                (int a, int b) = (Number(their, field), Number(my, field));
                Assert.True((a < 0) == (b < 0) && Math.Abs(a - b) < Pace, $"{field} of {both}");
            }

            Assert.True(which == "unix" || my.Groups["cp"].Value != "1", both);
            TimeSpan between = Date(my) - Date(their);
            Assert.True(between > TimeSpan.Zero && between < TimeSpan.FromMinutes(1), both);
        }

        Assert.Equal(7, theirs.Count);
        Assert.Equal(("-1", "SC", "0"), (mine["refused"].Groups["Tc"].Value, mine["refused"].Groups["ts"].Value, mine["refused"].Groups["B"].Value));
        Assert.Equal(("+1", "two"), (mine["retried"].Groups["rc"].Value, mine["retried"].Groups["s"].Value));
        Assert.InRange(Number(mine["queued"], "Tw"), 150, 2000);
        Assert.Equal(("sQ", "1"), (mine["late"].Groups["ts"].Value, mine["late"].Groups["bq"].Value));
        Assert.Equal("unix:1", $"{mine["unix"].Groups["ci"].Value}:{mine["unix"].Groups["cp"].Value}");
    }

    [Fact(Timeout = Quick)]
    public async Task Halog_reads_the_lines()
    {
        string halog = Tool.Need("halog", "haproxy");
        string file = Given.Path("log");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--name", "front", "--log", "haproxy", "--log-file", file);
        for (int i = 0; i < 3; i++)
        {
            await Say(proxy);
        }

        Assert.Equal(0, await proxy.Stop());
        string lines = string.Concat(File.ReadLines(file).Where(l => l[0] != 't').Select(l => l + "\n"));
        Outcome servers = await Tool.Run(halog, ["-s", "-4", "-srv"], 10, input: lines); // the first four words of a line are syslog's
        Assert.Contains("\nfront/echo ", servers.Good(), StringComparison.Ordinal);
        Outcome arrivals = await Tool.Run(halog, ["-s", "-4", "-ac", "1"], 10, input: lines);
        Assert.NotEmpty(arrivals.Good()); // by the dates
        Assert.Contains("3 lines in", arrivals.Err, StringComparison.Ordinal);
        Assert.Contains(" 0 parsing errors", arrivals.Err, StringComparison.Ordinal);
    }

    // ---- syslog

    [Theory(Timeout = Quick)]
    [InlineData(SocketType.Dgram)]
    [InlineData(SocketType.Stream)]
    public async Task Syslog_gets_messages_of_RFC_5424(SocketType type)
    {
        const string Name = "a \"b\"\n<13>1 - - - - - - forged \u001b[2J \u2028 \u202e \u0085 \u00e9";
        Upstream upstream = Given.Echo();
        using Syslog syslog = new(Given.Path("log.sock"), type);
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", upstream.Address, "--name", Name, "--log", "syslog", "--log-file", $"unix:{syslog.Path}", "-v");
        await Say(proxy);
        Assert.Equal(0, await proxy.Stop());
        await Wait.Until(() => syslog.Lines.Any(l => l.Contains("event=stopped")), "the last message");
        foreach (string line in syslog.Lines)
        {
            Match message = Message.Match(line);
            Assert.True(message.Success, line);
            Assert.DoesNotContain(line, c => char.IsControl(c) || c is '\u2028' or '\u202e');
            LogLine text = LogLine.Parse(message.Groups["text"].Value);
            Assert.Equal(text.Event, message.Groups["id"].Value);
            Assert.False(text.Has("time") || text.Has("level"), line);
            Assert.Equal((3 * 8) + (text.Event == "accepted" ? 7 : 6), int.Parse(message.Groups["pri"].Value, CultureInfo.InvariantCulture));
            Assert.Equal($"{proxy.Id}", message.Groups["pid"].Value);
            Assert.Equal(TimeSpan.Zero, DateTimeOffset.Parse(message.Groups["time"].Value, CultureInfo.InvariantCulture).Offset);
        }

        LogLine connection = LogLine.Parse(Message.Match(syslog.Lines.Single(l => l.Contains("event=connection"))).Groups["text"].Value);
        Assert.Equal((Name, 5, "--"), (connection["route"], connection.BytesUp, connection.End));
    }

    [Fact(Timeout = Quick)]
    public async Task Syslog_may_come_later_and_be_started_anew()
    {
        string path = Given.Path("log.sock");
        ProxyProcess proxy = await Given.Proxy(
            new Launch { Chatter = ["tcpproxy: lines of the log are lost: "] },
            "127.0.0.1:0", "echo", "--log", "syslog", "--log-file", $"unix:{path}");
        await Say(proxy); // which is lost, as the first line was
        await Wait.Until(() => proxy.RawLog.Length > 0, "a word on stderr");
        Assert.Equal($"tcpproxy: lines of the log are lost: cannot send them to {path}: no such file or directory", proxy.RawLog);
        for (int run = 0; run < 2; run++)
        {
            using Syslog syslog = new(path, SocketType.Dgram);
            await Wait.Until(
                () =>
                {
                    Say(proxy).Wait(TestContext.Current.CancellationToken);
                    return syslog.Lines.Count > 1;
                },
                "a message");
            Assert.Matches(@"<28>1 .* log - event=log message=""\d+ lines? dropped: nobody listened at ", syslog.Lines[0]);
            Assert.Contains("event=connection", syslog.Lines[1], StringComparison.Ordinal);
            syslog.Dispose();
            await Say(proxy);
            await Wait.Until(() => proxy.RawLog.Split('\n').Length == run + 2, "another word on stderr");
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_syslog_that_is_away_costs_no_descriptors()
    {
        ProxyProcess proxy = await Given.Proxy(
            new Launch { Chatter = ["tcpproxy: lines of the log are lost"] },
            "127.0.0.1:0", "echo", "--log", "syslog", "--log-file", $"unix:{Given.Path("log.sock")}");
        await Talk();
        int descriptors = proxy.Descriptors;
        for (int i = 0; i < 10; i++) // it is tried again each second
        {
            await Wait.Pause(500);
            await Talk();
        }

        Assert.InRange(proxy.Descriptors, 0, descriptors + 1 + Tool.LateFiles);

        async Task Talk()
        {
            Peer client = await Given.Client(proxy);
            await client.Ask("hello");
            client.Finish();
            await client.ExpectEnd();
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Rsyslog_understands_the_messages()
    {
        string rsyslogd = Tool.Need("rsyslogd", "rsyslog");
        Tool.NeedRoot("rsyslogd");
        string path = Given.Path("rs.sock");
        string output = Given.Path("rs.log");
        File.WriteAllText(Given.Path("rs.conf"), $"""
            module(load="imuxsock" SysSock.Use="off")
            input(type="imuxsock" Socket="{path}" UseSpecialParser="off")
            template(name="t" type="string" string="%app-name%|%procid%|%msgid%|%syslogfacility-text%.%syslogseverity-text%|%msg%\n")
            action(type="omfile" file="{output}" template="t")

            """);
        Tool.Background(Given, rsyslogd, "-n", "-f", Given.Path("rs.conf"), "-i", Given.Path("rs.pid"));
        await Wait.Until(() => File.Exists(path), "rsyslogd");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--log", "syslog", "--log-file", $"unix:{path}");
        await Say(proxy);
        Assert.Equal(0, await proxy.Stop());
        await Wait.Until(() => File.Exists(output) && File.ReadAllText(output).Contains("event=stopped"), "the last message");
        string line = Assert.Single(File.ReadLines(output), l => l.Contains("event=connection"));
        Assert.StartsWith($"tcpproxy|{proxy.Id}|connection|daemon.info|event=connection route=127.0.0.1:0 ", line, StringComparison.Ordinal);
    }

    /// <summary>systemd sets JOURNAL_STREAM to the device and inode of the socket that is stdout and stderr.</summary>
    [Theory(Timeout = Quick)]
    [InlineData("text", "listening", "^<6>event=listening route=")]
    [InlineData("json", "listening", "^<6>{\"time\":\"[^\"]*\",\"level\":\"info\",\"event\":\"listening\"")]
    [InlineData("text", "error", "^<3>tcpproxy: error: ")]
    public async Task The_journal_gets_priorities_and_no_second_time(string format, string word, string pattern)
    {
        string socat = Tool.Need("socat", "socat");
        string ports = Given.Path("ports");
        string arguments = word == "error" ? "127.0.0.1:0 echo --nonsense" : $"127.0.0.1:0 echo --log {format}";
        string script = Given.Write("script", $"""
            inode=$(readlink /proc/self/fd/2 | tr -cd 0-9)
            for stream in 8:$inode 8:1$inode; do
                JOURNAL_STREAM=$stream {ProxyProcess.Binary} {arguments} --port-file {ports} &
                until [ -s {ports} ] || ! kill -0 $!; do sleep 0.05; done 2>/dev/null
                kill $! 2>/dev/null
                wait $!
            done

            """);
        string[] lines = [.. (await Tool.Run(socat, "-u", $"EXEC:sh {script},stderr", "STDOUT")).Out.Split('\n')
            .Where(l => l.Contains(word, StringComparison.Ordinal))];
        Assert.Equal(2, lines.Length);
        Assert.Matches(pattern, lines[0]);
        Assert.DoesNotMatch("^<", lines[1]); // somebody else's socket
    }

    // ---- what clients send

    [Theory(Timeout = Quick)]
    [InlineData("text")]
    [InlineData("json")]
    [InlineData("haproxy")]
    [InlineData("syslog")]
    public async Task Nobody_can_write_a_line_of_the_log_or_to_the_terminal(string format)
    {
        const string Bad = "x\r\nlevel=error event=forged\u001b]0;title\u0007\u009b2J\u2028\u202e\0\" ' \\ [ / #";
        byte[] raw = [.. Encoding.UTF8.GetBytes(Bad), 0xff, 0xc3, 0x28, 0xed, 0xa0, 0x80];
        string file = Given.Path("log");
        string[] filter = Tool.IsPortable ? [] : ["--filter-up", "sh:cat >&2"];
        ProxyProcess proxy = await Given.Proxy(
        [
            "--log", format, "--log-file", file, "-v", "--retries", "0",
            "-l", "127.0.0.1:0", "--name", Bad[..^10].Replace("\0", ""), "--sni", "known.example", "-u", "echo",
            "-l", "127.0.0.1:0", "--accept-proxy", "127.0.0.1", "-u", "echo name=" + "a\u001b[1m",
            "-l", "127.0.0.1:0", .. filter, "-u", "discard",
        ]);
        Peer hello = await Given.Client(proxy);
        await hello.Send(Records(Hello.Message(raw)));
        await hello.Drain();
        Peer header = await Given.Client(proxy, listen: 1);
        await header.Send((byte[])[.. "PROXY "u8, .. raw, .. "\r\n"u8]);
        await header.Drain();
        Peer filtered = await Given.Client(proxy, listen: 2);
        await filtered.Send(raw);
        filtered.Finish();
        await filtered.Drain();
        Assert.Equal(0, await proxy.Stop());
        string[] lines = Encoding.UTF8.GetString(File.ReadAllBytes(file)).Split('\n');
        Assert.Equal("", lines[^1]);
        Assert.Contains(lines, l => l.Contains("forged", StringComparison.Ordinal)); // it did get that far
        foreach (string line in lines[..^1])
        {
            Assert.DoesNotContain(line, c => char.IsControl(c) || c is '\u2028' or '\u202e');
            if (format == "haproxy" && !line.StartsWith("time=", StringComparison.Ordinal))
            {
                Assert.Matches(Tcplog, line);
                continue;
            }

            Match message = Message.Match(line);
            Assert.Equal(format == "syslog", message.Success);
            Assert.NotEqual("forged", LogLine.Parse(message.Success ? message.Groups["text"].Value : line).Event);
        }
    }

    // ---- files

    [Fact(Timeout = Quick)]
    public async Task Logrotate_moves_the_file_away_and_USR1_begins_another()
    {
        string logrotate = Tool.Need("logrotate", "logrotate");
        string file = Given.Path("proxy.log");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--log-file", file);
        await Say(proxy);
        await Connections(file, 1);
        string config = Given.Path("rotate.conf");
        File.WriteAllText(config, $"{file} {{\n rotate 3\n postrotate\n  kill -USR1 {proxy.Id}\n endscript\n}}\n");
        (await Tool.Run(logrotate, "--force", "--state", Given.Path("state"), config)).Good();
        await Wait.Until(() => File.Exists(file), "a new file");
        await Say(proxy);
        await Connections(file, 1);
        await Connections($"{file}.1", 1);
        Assert.Equal(0, await proxy.Stop());
        Assert.DoesNotContain("stopped", File.ReadAllText($"{file}.1"), StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task A_file_that_cannot_be_opened_anew_is_kept()
    {
        string file = Given.Path("proxy.log");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--log-file", file);
        File.Move(file, $"{file}.1");
        Directory.CreateDirectory(file);
        proxy.Signal(ProxyProcess.SigUsr1);
        await Wait.Until(() => File.ReadAllText($"{file}.1").Contains("cannot open"), "a word about it");
        LogLine line = Assert.Single(File.ReadLines($"{file}.1").Select(LogLine.Parse), l => l.Event == "log");
        Assert.Equal("error", line.Level);
        Assert.StartsWith($"--log-file: cannot open {file}: ", line["message"], StringComparison.Ordinal);
        await Say(proxy);
        await Connections($"{file}.1", 1);
    }

    [Fact(Timeout = Quick)]
    public async Task USR1_means_nothing_to_a_log_on_stderr()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo");
        proxy.Signal(ProxyProcess.SigUsr1);
        await Say(proxy);
        await proxy.Connection();
    }

    [Fact(Timeout = Quick)]
    public async Task Two_that_write_one_file_lose_nothing_and_it_may_be_truncated()
    {
        const int Count = 400;
        Assert.SkipWhen(Tool.IsPortable, "no O_APPEND without libc");
        string file = Given.Path("proxy.log");
        File.WriteAllText(file, "time=before level=info event=before\n");
        ProxyProcess[] proxies =
        [
            await Given.Proxy("127.0.0.1:0", "echo", "--log-file", file),
            await Given.Proxy("127.0.0.1:0", "echo", "--log-file", file),
        ];
        await Wait.Many(2 * Count, 16, i => Say(proxies[i % 2]));
        await Connections(file, 2 * Count);
        Assert.Equal((2 * Count) + 3, File.ReadLines(file).Select(LogLine.Parse).Count());
        using (FileStream open = new(file, FileMode.Open, FileAccess.Write, FileShare.ReadWrite))
        {
            open.SetLength(0); // logrotate's copytruncate
        }

        await Say(proxies[0]);
        await Connections(file, 1);
        Assert.Single(File.ReadLines(file).Select(LogLine.Parse));
    }

    // ---- which connections

    [Theory(Timeout = Quick)]
    [InlineData("text")]
    [InlineData("json")]
    public async Task A_long_connection_is_logged_before_its_end(string format)
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--log", format, "--log-long", "400ms");
        await Say(proxy);
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        LogLine first = await proxy.Line("connection-long");
        Assert.Equal(
            [
                "time", "level", "event", "route", "client", "upstream", "server", "connect_ms", "duration_ms",
                "bytes_up", "bytes_down",
            ],
            first.Keys);
        Assert.Equal(("info", client.Local, 5, 5), (first.Level, first["client"], first.BytesUp, first.BytesDown));
        Assert.InRange(first.Number("duration_ms"), 399, 3000);
        await client.Ask("more");
        LogLine second = await proxy.Line("connection-long", l => l.BytesUp == 9);
        Assert.InRange(second.Number("duration_ms"), 799, 5000);
        client.Finish();
        await client.ExpectEnd();
        LogLine last = await proxy.Connection(client);
        Assert.All(proxy.Lines.Where(l => l.Event == "connection-long"), l => Assert.Equal(client.Local, l["client"]));
        Assert.InRange(
            proxy.Lines.Count(l => l.Event == "connection-long"), 2, last.Number("duration_ms") / 400); // once a period
    }

    [Fact(Timeout = Quick)]
    public async Task Probes_can_be_left_out()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(
            "--log-skip-empty", "-l", "127.0.0.1:0", "-u", upstream.Address,
            "-l", "127.0.0.1:0", "-u", $"127.0.0.1:{Given.RefusingPort()}", "--retries", "0");
        for (int i = 0; i < 2; i++)
        {
            Peer probe = await Given.Client(proxy);
            if (i == 0)
            {
                probe.Finish();
                await probe.ExpectEnd();
            }
            else
            {
                probe.Reset();
            }
        }

        Peer unserved = await Given.Client(proxy, listen: 1);
        await unserved.ExpectReset();
        await proxy.Connection(unserved); // which says that something is wrong
        await Say(proxy);
        await proxy.Connection(l => l.BytesUp == 5);
        Assert.Equal(0, await proxy.Stop());
        Assert.Equal(2, proxy.Lines.Count(l => l.Event == "connection"));
    }

    [Fact(Timeout = Quick)]
    public async Task A_reload_changes_which()
    {
        string file = Given.Path("proxy.conf");
        File.WriteAllText(file, "log-skip-empty\nlisten 127.0.0.1:0\nupstream echo\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        await Probe();
        await Wait.Until(IsCountedOut, "the end of the probe");
        File.WriteAllText(file, "log-long 300ms\nlisten 127.0.0.1:0\nupstream echo\n");
        Peer client = await Given.Client(proxy);
        proxy.Signal(ProxyProcess.SigHup);
        await proxy.Line("connection-long", l => l["client"] == client.Local);
        Assert.DoesNotContain(proxy.Lines, l => l.Event == "connection");
        await Probe();
        await proxy.Connection(l => l.BytesUp == 0);

        bool IsCountedOut()
        {
            proxy.Signal(ProxyProcess.SigUsr2);
            return proxy.Lines.Any(l => l.Event == "state" && l["message"].Contains(", 0 connections, ", StringComparison.Ordinal));
        }

        async Task Probe()
        {
            using Peer probe = await Peer.Connect(proxy.Endpoint());
            probe.Finish();
            await probe.ExpectEnd();
        }
    }

    // ---- the state

    [Theory(Timeout = Quick)]
    [InlineData("--log", "text")]
    [InlineData("--log", "json")]
    [InlineData("--log", "off")]
    [InlineData("--log-level", "warn")]
    public async Task USR2_tells_the_state(string option, string value)
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(
            new Launch { Chatter = ["tcpproxy: "] }, option, value,
            "-l", "127.0.0.1:0", "--name", "a\nb", "-u", $"{upstream.Address} name=one weight=3", "-u", "echo backup",
            "-l", "127.0.0.1:0", "--name", "c", "-u", "discard");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        proxy.Signal(ProxyProcess.SigUsr2);
        await Wait.Until(() => proxy.RawLog.Contains("server discard"), "the state");
        string[] said = proxy.RawLog.Split('\n');
        List<(string, string)> state = value is "off" or "warn"
            ? [.. said.Select(l => Regex.Match(l, "^tcpproxy: (?:route (.+?): )?(.*)$")).Select(m => (m.Groups[1].Value, m.Groups[2].Value))]
            : [.. proxy.Lines.Where(l => l.Event == "state").Select(l => (l.Has("route") ? l["route"].Replace("\n", "\\n") : "", l["message"]))];
        Assert.Equal(6, state.Count);
        Assert.Matches(@"^running for \ds, 1 connection, \d+ KB of memory, 0 lines of the log dropped$", state[0].Item2);
        Assert.Equal(
            [
                ("a\\nb", "1 connection"), ("a\\nb", "server one is up, 1 connection, weight 3"),
                ("a\\nb", "server echo is up, 0 connections, backup"), ("c", "0 connections"), ("c", "server discard is up, 0 connections"),
            ],
            state[1..]);
    }

    private async Task AnswerLater(Peer peer)
    {
        await peer.ReceiveText("hello");
        Interlocked.Increment(ref _asked);
        await _mayAnswer;
        await Wait.Pause(300);
        await peer.Send("answer7");
        await peer.ExpectEnd();
        peer.Finish();
    }

    /// <summary>One conversation of each kind; the lines of the last that was logged in it.</summary>
    private async Task<Dictionary<string, Match>> Converse(string log, Func<int, EndPoint> endpoint, string socket)
    {
        Dictionary<string, Match> lines = [];
        await One("plain", endpoint(0));
        await One("refused", endpoint(1));
        await One("retried", endpoint(2));
        await Two("queued", endpoint(3));
        await Two("late", endpoint(4));
        await One("long", endpoint(5));
        await One("plain", new UnixDomainSocketEndPoint(socket));
        return lines;

        async Task One(string which, EndPoint to)
        {
            string key = to is UnixDomainSocketEndPoint ? "unix" : which;
            int before = Lines(which).Count;
            TaskCompletionSource gate = new(TaskCreationOptions.RunContinuationsAsynchronously);
            _mayAnswer = which == "long" ? gate.Task : Task.CompletedTask;
            Task asking = Ask(to);
            await (which == "long" ? Task.CompletedTask : asking);
            lines[key] = await Line(which, before); // of a long one that before its end
            gate.SetResult();
            await asking;
        }

        async Task Two(string which, EndPoint to)
        {
            int before = Lines(which).Count;
            TaskCompletionSource gate = new(TaskCreationOptions.RunContinuationsAsynchronously);
            _mayAnswer = gate.Task;
            int asked = _asked;
            Task first = Ask(to);
            await Wait.Until(() => Volatile.Read(ref _asked) > asked, "the first to be served");
            Task second = Ask(to);
            if (which == "late")
            {
                lines[which] = await Line(which, before); // of the second, which gives up
            }

            gate.SetResult();
            await Task.WhenAll(first, second);
            if (which == "queued")
            {
                lines[which] = await Line(which, before + 1);
            }
        }

        async Task<Match> Line(string which, int index)
        {
            await Wait.Until(() => Lines(which).Count > index, "a line");
            string line = Lines(which)[index];
            Match match = Tcplog.Match(line);
            Assert.True(match.Success, line);
            await Wait.Pause(100); // for HAProxy to forget it
            return match;
        }

        List<string> Lines(string which) =>
            [.. File.ReadAllLines(log).Where(l => l.Contains($"] {which} ") && (which == "long" || !Regex.IsMatch(l, @"/\+\d+ \+")))];

        static async Task Ask(EndPoint to)
        {
            using Peer client = await Peer.Connect(to);
            try
            {
                await client.Send("hello");
                await client.Receive(7);
                client.Finish();
                await client.ExpectEnd();
            }
            catch (Exception e) when (e is SocketException or IOException or Xunit.Sdk.XunitException)
            {
                // refused, or too late
            }
        }
    }

    private static byte[] Records(byte[] message) =>
        [0x16, 3, 1, (byte)(message.Length >> 8), (byte)message.Length, .. message];

    private static int Number(Match line, string field) =>
        int.Parse(line.Groups[field].Value.TrimStart('+'), CultureInfo.InvariantCulture);

    private static DateTime Date(Match line) => DateTime.ParseExact(
        line.Groups["t"].Value, "dd/MMM/yyyy:HH:mm:ss.fff", CultureInfo.InvariantCulture);

    private async Task Say(ProxyProcess proxy)
    {
        using Peer client = await Peer.Connect(proxy.Endpoint());
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
    }

    private static Task Connections(string file, int count) => Wait.Until(
        () => File.ReadLines(file).Count(l => l.Contains("event=connection")) == count, $"{count} connections in {file}");
}

/// <summary>What syslog is to its clients: a socket of messages, or of lines.</summary>
internal sealed class Syslog : IDisposable
{
    private readonly Socket _socket;
    private readonly List<string> _lines = [];

    public Syslog(string path, SocketType type)
    {
        Path = path;
        _socket = new Socket(AddressFamily.Unix, type, ProtocolType.Unspecified);
        _socket.Bind(new UnixDomainSocketEndPoint(path));
        if (type == SocketType.Stream)
        {
            _socket.Listen();
        }

        new Thread(() => Read(type)) { IsBackground = true }.Start();
    }

    public string Path { get; }

    public IReadOnlyList<string> Lines
    {
        get
        {
            lock (_lines)
            {
                return [.. _lines];
            }
        }
    }

    public void Dispose()
    {
        _socket.Dispose();
        File.Delete(Path);
    }

    private void Read(SocketType type)
    {
        byte[] buffer = new byte[64 << 10];
        try
        {
            using Socket from = type == SocketType.Stream ? _socket.Accept() : _socket;
            string rest = "";
            for (int length; (length = from.Receive(buffer)) > 0;)
            {
                string[] lines = (rest + Encoding.UTF8.GetString(buffer, 0, length)).Split('\n');
                rest = type == SocketType.Stream ? lines[^1] : "";
                lock (_lines)
                {
                    _lines.AddRange(type == SocketType.Stream ? lines[..^1] : [string.Join('\n', lines)]);
                }
            }
        }
        catch (SocketException)
        {
            // disposed
        }
    }
}
