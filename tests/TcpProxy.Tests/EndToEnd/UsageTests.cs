using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text.RegularExpressions;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class UsageTests : EndToEndTest
{
    /// <summary>A command line in words, and what its one line must say, in any order.</summary>
    public static readonly TheoryData<string, string[]> Wrong = new()
    {
        { "", ["LISTEN", "UPSTREAM", "-h"] },
        { "127.0.0.1:0", ["127.0.0.1:0", "upstream"] },
        {
            "127.0.0.1:0 echo --idel-timeout 5s",
            ["--idel-timeout: unknown option", "did you mean '--idle-timeout'?"]
        },
        { "127.0.0.1:0 echo --idle 5s", ["--idle: unknown option", "did you mean '--idle-timeout'?"] },
        { "127.0.0.1:0 echo --xyzzy", ["--xyzzy: unknown option"] },
        { "127.0.0.1:0 echo -z", ["-z: unknown option"] },
        { "127.0.0.1:0 echo -qz", ["-z: unknown option"] },
        { "127.0.0.1:0 echo --balance lestconn", ["--balance: unknown policy", "did you mean 'leastconn'?"] },
        { "127.0.0.1:0 echo wieght=3", ["UPSTREAM: unknown setting 'wieght'", "did you mean 'weight'?"] },
        { "127.0.0.1:0 echo --check-send \\q", ["--check-send: ", "backslash"] },
        { "127.0.0.1:0 echo --check-send PING", ["--check-send: ", "--check TIME"] },
        { "-l 127.0.0.1:0 -u echo --check-expect PONG --check-rise 1", ["--check-expect: ", "--check TIME"] },
        { "127.0.0.1:0 echo --idle-timeout banana", ["--idle-timeout: ", "banana"] },
        { "127.0.0.1:0 echo --idle-timeout 5parsecs", ["--idle-timeout: ", "5parsecs"] },
        { "127.0.0.1:0 echo --idle-timeout=-5s", ["--idle-timeout: ", "-5s"] },
        { "127.0.0.1:0 echo --idle-timeout 9999999999999d", ["--idle-timeout: ", "9999999999999d"] },
        { "127.0.0.1:0 echo --idle-timeout=", ["--idle-timeout: "] },
        { "127.0.0.1:0 echo --idle-timeout", ["--idle-timeout: ", "value"] },
        { "127.0.0.1:0 echo --max-bytes-up 10x", ["--max-bytes-up: ", "10x"] },
        { "127.0.0.1:0 echo --max-bytes-down 99999999999999g", ["--max-bytes-down: ", "99999999999999g"] },
        { "127.0.0.1:0 echo --rate-up 10m", ["--rate-up: ", "'10m'", "10m/s"] },
        { "127.0.0.1:0 echo --rate-total-down 10x/s", ["--rate-total-down: ", "10x"] },
        { "127.0.0.1:0 echo --refuse rest", ["--refuse: ", "'rest'", "did you mean 'reset'?"] },
        { "127.0.0.1:0 echo --max-lifetime=1s@2", ["--max-lifetime: ", "'1s@2'"] },
        { "127.0.0.1:0 echo --connect-rate 10", ["--connect-rate: ", "'10'", "10/s"] },
        { "127.0.0.1:0 echo --connect-rate-per-ip x/s", ["--connect-rate-per-ip: ", "'x'"] },
        { "127.0.0.1:0 echo --ip6-prefix 0", ["--ip6-prefix: ", "'0'"] },
        { "127.0.0.1:0 echo --max-connections-per-ip few", ["--max-connections-per-ip: ", "few"] },
        { "127.0.0.1:0 echo --allow everybody", ["--allow: ", "'everybody'", "10.0.0.0/8"] },
        { "127.0.0.1:0 echo --deny 10.0.0.1/8", ["--deny: ", "'10.0.0.1/8'", "did you mean '10.0.0.0/8'?"] },
        { "127.0.0.1:0 echo --deny 010.0.0.1", ["--deny: ", "'010.0.0.1'"] },
        { "127.0.0.1:0 echo --deny=", ["--deny: ", "''"] },
        { "127.0.0.1:0 echo --deny @/nonexistent/list", ["--deny: ", "/nonexistent/list", "no such file"] },
        { "127.0.0.1:0 echo --deny=@", ["--deny: ", "empty file name"] },
        { "127.0.0.1:0 echo --allow=all\tmno", ["--allow: ", "unknown day", "mon"] },
        { "127.0.0.1:0 echo --allow=all\t9-17", ["--allow: ", "'9'", "09:00-17:30"] },
        { "127.0.0.1:0 echo --allow=all\t09:00-09:00", ["--allow: ", "'09:00-09:00'", "22:00-06:00"] },
        { "127.0.0.1:0 echo --allow=all\tEurope/Atlantis", ["--allow: ", "'Europe/Atlantis'", "time zone"] },
        { "127.0.0.1:0 echo --close-at-window-end=yes", ["--close-at-window-end: ", "value"] },
        { "127.0.0.1:0 echo --explain 10.0.0.0/8", ["--explain: ", "'10.0.0.0/8'", "one address"] },
        { "127.0.0.1:0 echo --explain me", ["--explain: ", "'me'"] },
        { "127.0.0.1:0 echo --explain 10.0.0.1@noon", ["--explain: ", "'noon'", "2026-11-23T08:30"] },
        { "--explain 10.0.0.1", ["no route"] },
        { "127.0.0.1:0 echo --max-connections many", ["--max-connections: ", "many"] },
        { "127.0.0.1:0 echo --max-connections 1.5", ["--max-connections: ", "1.5"] },
        { "127.0.0.1:0 echo --retries=-1", ["--retries: ", "-1"] },
        { "127.0.0.1:0 echo --buffer-size huge", ["--buffer-size: ", "huge"] },
        { "127.0.0.1:0 echo --threads none", ["--threads: ", "none"] },
        { "127.0.0.1:0 echo --log xml", ["--log: ", "xml"] },
        { "127.0.0.1:0 echo --log jsno", ["--log: ", "jsno", "did you mean 'json'?"] },
        { "127.0.0.1:0 echo --log-level wran", ["--log-level: ", "wran", "did you mean 'warn'?"] },
        { "127.0.0.1:0 echo --pcap=", ["--pcap: ", "empty"] },
        { "127.0.0.1:0 echo --pcap-rotate 10x", ["--pcap-rotate: ", "10x"] },
        { "127.0.0.1:0 echo --pcap-rotate 1k", ["--pcap-rotate: ", "1k", "65536"] },
        { "127.0.0.1:0 echo --once=yes", ["--once: ", "value"] },
        { "127.0.0.1:0 echo --source 300.1.1.1", ["--source: ", "300.1.1.1"] },
        { "127.0.0.1:99999 echo", ["127.0.0.1:99999", "port"] },
        { "127.0.0.1:http echo", ["127.0.0.1:http", "port"] },
        { "[::1:80 echo", ["[::1:80"] },
        { "unix: echo", ["unix:"] },
        { "fd: echo", ["fd:"] },
        { "127.0.0.1:0 nosuchhost", ["nosuchhost", "port"] },
        { "127.0.0.1:0 nosuchhost:", ["nosuchhost:", "port"] },
        { "127.0.0.1:0 127.0.0.1:0", ["127.0.0.1:0", "port"] },
        { "127.0.0.1:8009-8001 echo", ["127.0.0.1:8009-8001"] },
        { "127.0.0.1:8001-8003 127.0.0.1:9001-9002", ["8001-8003", "9001-9002"] },
        { "127.0.0.1:8001 127.0.0.1:9001-9002", ["9001-9002"] },
        { "127.0.0.1 notaport 127.0.0.1 80", ["port"] },
        { "-u echo", ["no route", "LISTEN"] },
        { "-l 127.0.0.1:0", ["127.0.0.1:0", "upstream"] },
        { "-l 127.0.0.1:0 -l 127.0.0.1:0 -u echo", ["127.0.0.1:0", "upstream"] },
        { "-l 127.0.0.1:0 -u echo stray", ["stray"] },
        { "-l", ["value"] },
        { "-c /nonexistent/tcpproxy.conf", ["/nonexistent/tcpproxy.conf"] },
        { "127.0.0.1:0 echo --dump hexx", ["--dump: ", "'hexx'", "did you mean 'hex'?"] },
        { "127.0.0.1:0 echo --dump-limit much", ["--dump-limit: ", "'much'"] },
        { "127.0.0.1:0 echo --record=", ["--record: ", "empty"] },
        { "--wait-for", ["--wait-for: ", "value"] },
        { "--wait-for 127.0.0.1", ["--wait-for: ", "127.0.0.1", "port"] },
        { "127.0.0.1:0 echo --drain-timeout soon", ["--drain-timeout: ", "soon"] },
        { "--check-config", ["no route"] },
    };

    [Theory(Timeout = Quick)]
    [MemberData(nameof(Wrong))]
    public async Task A_wrong_command_line_gets_one_line_and_status_two(string words, string[] expected)
    {
        ArgumentNullException.ThrowIfNull(words);
        string ports = Given.Path("ports");
        Outcome outcome = await Tool.Run(
            ProxyProcess.Binary,
            ["--port-file", ports, .. words.Split(' ', StringSplitOptions.RemoveEmptyEntries)]);
        string line = Assert.Single(outcome.ErrLines);
        Assert.StartsWith("tcpproxy: error: ", line, StringComparison.Ordinal);
        Assert.EndsWith("\n", outcome.Err, StringComparison.Ordinal);
        Assert.All(expected, part => Assert.Contains(part, line, StringComparison.Ordinal));
        Assert.Equal((2, string.Empty), (outcome.Status, outcome.Out));
        Assert.False(File.Exists(ports), "something was started");
    }

    [Fact(Timeout = Quick)]
    public async Task A_wrong_word_of_strange_bytes_is_answered_in_one_clean_line()
    {
        Outcome outcome = await Tool.Proxy("127.0.0.1:0", "echo", "--log", "a\nb\u001b[31m\u00e9");
        string line = Assert.Single(outcome.ErrLines);
        Assert.DoesNotContain(line, char.IsControl);
        Assert.Equal(2, outcome.Status);
    }

    [Fact(Timeout = Quick)]
    public async Task A_mistake_in_a_later_route_starts_no_earlier_one()
    {
        int port = Given.FreePorts(1);
        Outcome outcome = await Tool.Proxy(
            "-l", $"127.0.0.1:{port}", "-u", "echo", "-l", "127.0.0.1:0", "-u", "echo", "--retries", "x");
        Assert.Equal(2, outcome.Status);
        Assert.Single(outcome.ErrLines);
    }

    [Theory(Timeout = Quick)]
    [InlineData("-h")]
    [InlineData("--help")]
    public async Task Help_goes_to_stdout(string word)
    {
        Outcome outcome = await Tool.Proxy(word);
        Assert.Equal((0, string.Empty), (outcome.Status, outcome.Err));
        Assert.Contains("--max-connections", outcome.Out, StringComparison.Ordinal);
        Assert.All(outcome.Out.Split('\n'), l => Assert.True(l.Length <= 110, $"a long line: {l}"));
    }

    [Fact(Timeout = Quick)]
    public async Task Every_option_due_now_stands_in_the_full_help_and_is_known()
    {
        string help = (await Tool.Proxy("--help")).Good();
        string brief = (await Tool.Proxy("-h")).Good();
        Assert.True(brief.Length < help.Length, "the short help is not shorter");
        string[] due =
        [
            "listen", "upstream", "name", "connect-timeout", "retries", "source", "resolve",
            "balance", "max-fails", "fail-timeout", "check", "check-rise", "check-fall", "check-send", "check-expect",
            "queue", "queue-timeout", "max-connections", "max-bytes-up", "max-bytes-down", "max-lifetime", "idle-timeout",
            "max-connections-per-ip", "ip6-prefix", "connect-rate", "connect-rate-per-ip",
            "allow", "deny", "close-at-window-end", "explain",
            "refuse", "rate-up", "rate-down", "rate-total-up", "rate-total-down",
            "fin-timeout", "keepalive", "sni", "send-proxy", "accept-proxy", "preread-timeout",
            "dump", "dump-limit", "record", "pcap", "pcap-rotate",
            "replace-up", "replace-down", "block-up", "block-down", "filter-up", "filter-down", "toxic", "seed",
            "log", "log-file", "stats", "control", "ctl",
            "log-level", "log-long", "log-skip-empty", "config", "check-config", "reload-dry-run",
            "drain-timeout", "threads", "buffer-size", "splice", "user", "install-service", "pid-file",
            "port-file", "once", "quiet", "verbose",
            "help", "version", "wait-for", "timeout",
        ];
        Assert.All(due, name => Assert.Matches($@"--{name}\b", help));
        IEnumerable<string> known = Regex.Matches(help, @"(?<![\w-])--([a-z][a-z0-9-]*)").Select(
            m => m.Groups[1].Value);
        Assert.Empty(known.Distinct().Except(due));
    }

    [Theory(Timeout = Quick)]
    [InlineData("-V")]
    [InlineData("--version")]
    public async Task The_version_is_one_line(string word)
    {
        Outcome outcome = await Tool.Proxy(word);
        Assert.Matches(@"^tcpproxy \d+\.\d+\.\d+\S*( .*)?\n$", outcome.Good());
        Assert.Equal(string.Empty, outcome.Err);
    }

    [Theory(Timeout = Quick)]
    [InlineData("127.0.0.1:0 echo --idle-timeout=5s")]
    [InlineData("127.0.0.1:0 echo --idle-timeout 5")]
    [InlineData("--idle-timeout 5m 127.0.0.1:0 echo")]
    [InlineData("127.0.0.1:0 --idle-timeout 500ms echo")]
    [InlineData("-qv 127.0.0.1:0 echo")]
    [InlineData("-l127.0.0.1:0 -uecho")]
    [InlineData("--listen=127.0.0.1:0 --upstream=echo")]
    [InlineData("-q -- 127.0.0.1:0 echo")]
    [InlineData("127.0.0.1 0 127.0.0.1 80")]
    [InlineData("127.0.0.1 0 127.0.0.1 80 --max-connections 10")]
    [InlineData("127.0.0.1:0 echo --max-bytes-up off --max-bytes-down 0 --idle-timeout off")]
    [InlineData("127.0.0.1:0 127.0.0.1:80 127.0.0.1:81 [::1]:82 unix:/tmp/x discard")]
    [InlineData("127.0.0.1:8001-8003 127.0.0.1:9001-9003")]
    [InlineData("127.0.0.1:8001-8003 127.0.0.1:9001")]
    [InlineData("*:0 echo")]
    [InlineData(":0 echo")]
    [InlineData("0 8080")]
    [InlineData("0 8080 weight=3 --balance source 8081 backup name=b max-connections=9 slow-start=off --queue 5")]
    public async Task A_right_command_line_passes_the_check(string words)
    {
        ArgumentNullException.ThrowIfNull(words);
        Outcome outcome = await Tool.Run(ProxyProcess.Binary, [.. words.Split(' '), "--check-config"]);
        if (words.Contains("-- ", StringComparison.Ordinal))
        {
            // after -- an option is a word: the command line is wrong, and says which word is too much
            Assert.Equal(2, outcome.Status);
            return;
        }

        Assert.True(outcome.Status == 0, outcome.Err);
    }
}
