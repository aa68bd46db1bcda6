using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text;
using Xunit;

namespace TcpProxy.Tests;

public sealed class AccessRulesTests : IDisposable
{
    private static readonly DateTime Noon = new(2026, 11, 23, 12, 0, 0, DateTimeKind.Utc); // a Monday

    private readonly string _folder = Directory.CreateTempSubdirectory("tcpproxy-rules-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    // ---- order

    [Theory]
    [InlineData("", "10.0.0.1", true)]
    [InlineData("allow 10.0.0.0/8", "10.0.0.1", true)]
    [InlineData("allow 10.0.0.0/8", "11.0.0.1", false)]
    [InlineData("deny 10.0.0.0/8", "10.0.0.1", false)]
    [InlineData("deny 10.0.0.0/8", "11.0.0.1", true)]
    [InlineData("deny 10.1.0.0/16; allow 10.0.0.0/8", "10.1.2.3", false)]
    [InlineData("deny 10.1.0.0/16; allow 10.0.0.0/8", "10.2.2.3", true)]
    [InlineData("deny 10.1.0.0/16; allow 10.0.0.0/8", "11.0.0.1", false)]
    [InlineData("allow 10.0.0.0/8; deny 10.1.0.0/16", "10.1.2.3", true)]
    [InlineData("allow 10.0.0.0/8; deny all", "10.1.2.3", true)]
    [InlineData("allow 10.0.0.0/8; deny all", "::1", false)]
    [InlineData("deny 10.1.2.3", "10.1.2.3", false)]
    [InlineData("deny 10.1.2.3", "10.1.2.4", true)]
    [InlineData("deny 10.1.2.3", "::ffff:10.1.2.3", false)]
    [InlineData("deny ::ffff:10.1.2.3", "10.1.2.3", false)]
    [InlineData("deny ::ffff:10.0.0.0/104", "10.1.2.3", false)]
    [InlineData("deny ::ffff:10.0.0.0/104", "11.1.2.3", true)]
    [InlineData("deny ::/0", "10.1.2.3", true)]
    [InlineData("deny ::/0", "::ffff:10.1.2.3", true)]
    [InlineData("deny ::/64", "10.1.2.3", true)]
    [InlineData("deny ::/0", "2001:db8::1", false)]
    [InlineData("deny 0.0.0.0/0", "2001:db8::1", true)]
    [InlineData("deny 0.0.0.0/0", "255.255.255.255", false)]
    [InlineData("deny 2001:DB8::/33", "2001:db8:7fff::1", false)]
    [InlineData("deny 2001:db8::/33", "2001:db8:8000::1", true)]
    [InlineData("deny 2001:db8:0:0::1", "2001:db8::1", false)]
    [InlineData("deny fe80::/10", "fe80::1%2", false)]
    [InlineData("deny all", "unix", false)]
    [InlineData("allow all", "unix", true)]
    [InlineData("deny unix", "unix", false)]
    [InlineData("deny unix", "0.0.0.0", true)]
    [InlineData("deny unix", "::", true)]
    [InlineData("allow unix", "::", false)]
    [InlineData("deny 0.0.0.0/0; deny ::/0", "unix", true)]
    public void The_first_rule_that_matches_decides(string rules, string client, bool expected) =>
        Assert.Equal(expected, Rules(rules).Judge(EndPointOf(client), Noon).IsAllowed);

    [Fact]
    public void The_verdict_names_its_rule()
    {
        AccessRules rules = Rules("deny 10.1.0.0/16 mon; allow 10.0.0.0/8");
        Assert.Equal("rule --deny 10.1.0.0/16 mon", Words("10.1.2.3"));
        Assert.Equal("rule --allow 10.0.0.0/8", Words("10.2.2.3"));
        Assert.Equal("no allow rule matches", Words("11.0.0.1"));
        Assert.Equal("no rule matches", Rules("deny 10.1.0.0/16").Judge(null, Noon).Words);

        string Words(string client) => rules.Judge(EndPointOf(client), Noon).Words;
    }

    [Fact]
    public void A_refusal_is_orderly_and_named()
    {
        CloseReason reason = Rules("deny 10.1.0.0/16").Refuse(EndPointOf("10.1.0.0"))!;
        Assert.Equal(("PR", "rule --deny 10.1.0.0/16", true, true), (reason.Code, reason.Words, reason.IsOrderly, reason.IsRefusal));
        Assert.Null(Rules("deny 10.1.0.0/16").Refuse(EndPointOf("10.2.0.0")));
    }

    [Fact]
    public void Rules_of_the_command_line_stand_before_those_of_the_file_and_defaults_before_those_of_a_route()
    {
        string file = Write("conf", "allow 10.0.0.1\nlisten 127.0.0.1:0\nupstream echo\nallow 10.0.0.2\nlisten 127.0.0.1:0\nupstream echo\n");
        Settings settings = CommandLine.Parse(["-c", file, "--deny", "10.0.0.1", "--deny", "10.0.0.2"]);
        Assert.Equal("rule --deny 10.0.0.1", Words(0, "10.0.0.1"));
        Assert.Equal("rule --deny 10.0.0.2", Words(1, "10.0.0.2"));
        settings = CommandLine.Parse(["-c", file, "--deny", "10.0.0.3"]);
        Assert.Equal("rule --deny 10.0.0.3", Words(0, "10.0.0.3"));
        Assert.Equal($"rule {file}:1: allow 10.0.0.1", Words(1, "10.0.0.1"));
        Assert.Equal($"rule {file}:4: allow 10.0.0.2", Words(0, "10.0.0.2"));
        Assert.Equal("no allow rule matches", Words(1, "10.0.0.2"));

        string Words(int route, string client) => settings.Routes[route].Access.Judge(EndPointOf(client), Noon).Words;
    }

    // ---- times

    [Theory]
    [InlineData("mon", "2026-11-23T12:00", true)] // a Monday
    [InlineData("tue", "2026-11-23T12:00", false)]
    [InlineData("mon-fri", "2026-11-27T23:59", true)]
    [InlineData("mon-fri", "2026-11-28T00:00", false)]
    [InlineData("sat,sun", "2026-11-29T12:00", true)]
    [InlineData("sat,sun", "2026-11-23T12:00", false)]
    [InlineData("fri-mon", "2026-11-29T12:00", true)]
    [InlineData("fri-mon", "2026-11-24T12:00", false)]
    [InlineData("mon,wed-fri", "2026-11-26T12:00", true)]
    [InlineData("mon,wed-fri", "2026-11-24T12:00", false)]
    [InlineData("mon-sun", "2026-11-25T12:00", true)]
    [InlineData("09:00-17:30", "2026-11-23T08:59", false)]
    [InlineData("09:00-17:30", "2026-11-23T09:00", true)]
    [InlineData("09:00-17:30", "2026-11-23T17:29", true)]
    [InlineData("09:00-17:30", "2026-11-23T17:30", false)]
    [InlineData("22:00-06:00", "2026-11-23T21:59", false)]
    [InlineData("22:00-06:00", "2026-11-23T22:00", true)]
    [InlineData("22:00-06:00", "2026-11-23T05:59", true)]
    [InlineData("22:00-06:00", "2026-11-23T06:00", false)]
    [InlineData("00:00-24:00", "2026-11-23T00:00", true)]
    [InlineData("23:59-24:00", "2026-11-23T23:59", true)]
    [InlineData("12:00-00:00", "2026-11-23T23:59", true)]
    [InlineData("12:00-00:00", "2026-11-24T00:00", false)]
    [InlineData("fri 22:00-06:00", "2026-11-28T05:59", true)] // belongs to Friday
    [InlineData("fri 22:00-06:00", "2026-11-27T05:59", false)]
    [InlineData("fri 22:00-06:00", "2026-11-28T22:00", false)]
    [InlineData("sat 22:00-06:00", "2026-11-29T03:00", true)] // over the end of the week
    [InlineData("mon-fri\t22:00-06:00", "2026-11-28T03:00", true)]
    [InlineData("mon-fri 22:00-06:00", "2026-11-23T03:00", false)]
    public void A_window_holds_on_its_days_and_between_its_times(string when, string utc, bool expected)
    {
        Assert.Equal(expected, Schedule.Parse($"{when} UTC")!.Holds(Utc(utc)));
        Assert.Equal(expected, Schedule.Parse($"{when} Asia/Tokyo")!.Holds(Utc(utc).AddHours(-9)));
    }

    [Fact]
    public void No_words_are_no_schedule() => Assert.Null(Schedule.Parse(" "));

    /// <summary>Every minute of the days around the change of clocks, against an offset that is known without a zone file.</summary>
    [Theory]
    [InlineData("Europe/Berlin", "2026-03-29T01:00", 1, 2)]
    [InlineData("Europe/Berlin", "2026-10-25T01:00", 2, 1)]
    [InlineData("America/New_York", "2026-03-08T07:00", -5, -4)]
    [InlineData("America/New_York", "2026-11-01T06:00", -4, -5)]
    public void Both_nights_of_the_year_are_right(string zone, string change, int before, int after)
    {
        (string Days, int From, int To)[] windows =
        [
            ("", 120, 180), ("", 90, 150), ("", 150, 210), ("", 1320, 360), ("sat", 1320, 150), ("sun", 0, 1440), ("sat,sun", 60, 120),
        ];
        foreach ((string days, int from, int to) in windows)
        {
            Schedule schedule = Schedule.Parse($"{days} {Clock(from)}-{Clock(to)} {zone}")!;
            for (DateTime utc = Utc(change).AddDays(-1); utc < Utc(change).AddDays(1); utc = utc.AddMinutes(1))
            {
                DateTime there = utc.AddHours(utc < Utc(change) ? before : after);
                int minute = (int)there.TimeOfDay.TotalMinutes;
                bool isNight = to < from;
                DayOfWeek day = isNight && minute < to ? there.AddDays(-1).DayOfWeek : there.DayOfWeek;
                bool expected = (days.Length == 0 || days.Contains($"{day}"[..3].ToLowerInvariant(), StringComparison.Ordinal))
                    && (isNight ? minute >= from || minute < to : minute >= from && minute < to);
                Assert.True(expected == schedule.Holds(utc), $"{days} {Clock(from)}-{Clock(to)} at {utc:u}");
            }
        }

        static string Clock(int minutes) => $"{minutes / 60:00}:{minutes % 60:00}";
    }

    [Fact]
    public void An_hour_that_comes_twice_is_in_the_window_twice_and_one_that_is_skipped_is_not()
    {
        Schedule schedule = Schedule.Parse("02:00-03:00 Europe/Berlin")!;
        Assert.Equal(120, Enumerable.Range(0, 1440).Count(m => schedule.Holds(Utc("2026-10-24T12:00").AddMinutes(m))));
        Assert.Equal(0, Enumerable.Range(0, 1440).Count(m => schedule.Holds(Utc("2026-03-28T12:00").AddMinutes(m))));
        Assert.Equal(60, Enumerable.Range(0, 1440).Count(m => schedule.Holds(Utc("2026-06-01T12:00").AddMinutes(m))));
    }

    [Fact]
    public void A_rule_that_does_not_hold_now_is_passed_over()
    {
        AccessRules rules = Rules("deny 10.1.0.0/16 sat UTC; allow 10.0.0.0/8 mon-fri 09:00-17:30 UTC; allow 10.2.0.0/16");
        Assert.Equal("rule --deny 10.1.0.0/16 sat UTC", Words("10.1.0.1", "2026-11-28T12:00"));
        Assert.Equal("rule --allow 10.0.0.0/8 mon-fri 09:00-17:30 UTC", Words("10.1.0.1", "2026-11-27T12:00"));
        Assert.Equal("no allow rule matches", Words("10.1.0.1", "2026-11-27T18:00"));
        Assert.Equal("rule --allow 10.2.0.0/16", Words("10.2.0.1", "2026-11-27T18:00"));

        string Words(string client, string time) => rules.Judge(EndPointOf(client), Utc(time)).Words;
    }

    // ---- what is wrong

    [Theory]
    [InlineData("", "'' is not a network")]
    [InlineData("everybody", "'everybody' is not a network")]
    [InlineData("10.0.0.0/33", "'33' is not between 0 and 32")]
    [InlineData("10.0.0.0/", "'' is not a number")]
    [InlineData("10.0.0.0/-1", "'-1' is not a number")]
    [InlineData("10.0.0.0/ 8", "'8' is not a time window")]
    [InlineData("10.0.0/8", "'10.0.0/8' is not a network")]
    [InlineData("010.0.0.1", "'010.0.0.1' is not a network")]
    [InlineData("0x0a.0.0.1", "'0x0a.0.0.1' is not a network")]
    [InlineData("256.0.0.1", "'256.0.0.1' is not a network")]
    [InlineData("1.2.3.4:80", "'1.2.3.4:80' is not a network")]
    [InlineData("[::1]", "'[::1]' is not a network")]
    [InlineData("[::1]:80", "'[::1]:80' is not a network")]
    [InlineData("fe80::1%lo", "'fe80::1%lo' is not a network")]
    [InlineData("2001:db8::/129", "'129' is not between 0 and 128")]
    [InlineData("10.0.0.1/8", "'10.0.0.1/8' has bits beyond its prefix; did you mean '10.0.0.0/8'?")]
    [InlineData("2001:db8::1/32", "'2001:db8::1/32' has bits beyond its prefix; did you mean '2001:db8::/32'?")]
    [InlineData("10.0.0.0/8 mno", "unknown day 'mno'; it is one of sun, mon,")]
    [InlineData("10.0.0.0/8 mon-fri-sun", "unknown day 'fri-sun'")]
    [InlineData("10.0.0.0/8 mon,,tue", "unknown day ''")]
    [InlineData("10.0.0.0/8 9:00-17:30", "'9:00' is not a time of the day; write 09:00-17:30")]
    [InlineData("10.0.0.0/8 09:00", "'09:00' is not a time window")]
    [InlineData("10.0.0.0/8 09:00-10:00-11:00", "'09:00-10:00-11:00' is not a time window")]
    [InlineData("10.0.0.0/8 09:60-10:00", "'09:60' is not a time of the day")]
    [InlineData("10.0.0.0/8 24:01-10:00", "'24:01' is not a time of the day")]
    [InlineData("10.0.0.0/8 24:00-10:00", "'24:00-10:00' is not a time window")]
    [InlineData("10.0.0.0/8 10:00-10:00", "'10:00-10:00' is not a time window")]
    [InlineData("10.0.0.0/8 Mars/Olympus", "'Mars/Olympus' is not known here as days, a time window or a time zone")]
    [InlineData("10.0.0.0/8 ../../etc/passwd", "is not known here as")]
    [InlineData("10.0.0.0/8 09:00-10:00 mon", "'mon' is not known here as")]
    [InlineData("10.0.0.0/8 mon 09:00-10:00 UTC UTC", "'UTC UTC' is not known here as")]
    [InlineData("@", "an empty file name")]
    [InlineData("@/nonexistent/list", "cannot read /nonexistent/list: no such file or directory")]
    [InlineData("@/", "cannot read /: permission denied")]
    public void A_wrong_rule_is_answered_with_what_is_wrong(string rule, string expected) =>
        Assert.Contains(expected, Assert.Throws<FormatException>(() => Rule("allow", rule)).Message, StringComparison.Ordinal);

    // ---- files

    [Theory]
    [InlineData("10.0.0.0/8\n11.0.0.0/8\n", "11.1.1.1", 2)]
    [InlineData("10.0.0.0/8\n11.0.0.0/8", "11.1.1.1", 2)] // no last newline
    [InlineData("10.0.0.0/8\r\n11.0.0.0/8\r\n", "11.1.1.1", 2)]
    [InlineData("\ufeff10.0.0.0/8\n", "10.1.1.1", 1)]
    [InlineData("# all of them\n\n  \t\n  10.0.0.0/8   # ours\n#11.0.0.0/8", "10.1.1.1", 4)]
    [InlineData("#\n#11.0.0.0/8", "11.1.1.1", 0)]
    [InlineData("", "11.1.1.1", 0)]
    [InlineData("unix\n", "unix", 1)]
    [InlineData("1.1.1.1\nall\n", "unix", 2)]
    [InlineData("1.1.1.1\nall\n", "1.1.1.1", 2)] // the widest that has it
    [InlineData("1.1.1.0/24\n1.1.1.0/24\n", "1.1.1.1", 1)]
    [InlineData("10.0.0.0/8 mon\n10.1.0.0/16 tue\n10.1.0.0/16\tmon UTC\n10.1.2.3 sun UTC", "10.1.2.3", 1)]
    [InlineData("10.0.0.0/8 sun UTC\n10.1.0.0/16 tue UTC\n10.1.0.0/16\tmon UTC\n10.1.2.3 sun UTC", "10.1.2.3", 3)]
    public void A_file_has_one_rule_a_line(string text, string client, int line)
    {
        string file = Write("list", text);
        Verdict verdict = Rules($"deny @{file}").Judge(EndPointOf(client), Noon);
        Assert.Equal(line == 0, verdict.IsAllowed);
        Assert.Equal(line == 0 ? "no rule matches" : $"rule --deny @{file} ({file}:{line})", verdict.Words);
    }

    [Fact]
    public void A_schedule_behind_a_file_is_of_all_that_stands_in_it()
    {
        string file = Write("list", "10.0.0.0/8\n11.0.0.0/8 12:00-13:00 UTC\n");
        AccessRules rules = Rules($"deny @{file} mon UTC");
        Assert.True(rules.Judge(EndPointOf("10.0.0.1"), Noon.AddDays(1)).IsAllowed);
        Assert.False(rules.Judge(EndPointOf("10.0.0.1"), Noon).IsAllowed);
        Assert.False(rules.Judge(EndPointOf("11.0.0.1"), Noon).IsAllowed);
        Assert.True(rules.Judge(EndPointOf("11.0.0.1"), Noon.AddHours(1)).IsAllowed);
    }

    [Fact]
    public void An_empty_file_of_those_who_are_allowed_allows_nobody() =>
        Assert.False(Rules($"allow @{Write("list", "# nobody\n")}").Judge(EndPointOf("10.0.0.1"), Noon).IsAllowed);

    [Theory]
    [InlineData("10.0.0.0/8\n10.0.0.1/8\n", ":2: '10.0.0.1/8' has bits beyond its prefix")]
    [InlineData("\n\r\n# x\nfoo", ":4: 'foo' is not a network")]
    [InlineData("10.0.0.0/8 mno", ":1: unknown day 'mno'; it is one of sun, mon,")]
    [InlineData("10.0.0.0/8\n@list", ":2: '@list' is not a network")]
    [InlineData("10.0.0.0/8\n\0", ":2: '\0' is not a network")]
    public void A_bad_line_is_named(string text, string expected)
    {
        string file = Write("list", text);
        string message = Assert.Throws<FormatException>(() => Rule("allow", $"@{file}")).Message;
        Assert.StartsWith(file + expected, message, StringComparison.Ordinal);
    }

    [Fact]
    public void Bytes_that_are_no_text_are_a_bad_line()
    {
        string file = Write("list", "");
        File.WriteAllBytes(file, [0xff, 0xfe, (byte)'1']);
        Assert.StartsWith($"{file}:1: ", Assert.Throws<FormatException>(() => Rule("allow", $"@{file}")).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_file_has_a_hundred_different_times_at_most()
    {
        string lines = string.Concat(Enumerable.Range(0, 100).Select(i => $"10.0.0.{i} 00:00-{i / 60:00}:{(i % 60) + 0:00}\n"))
            .Replace("00:00-00:00", "00:00-24:00", StringComparison.Ordinal);
        Rule("deny", $"@{Write("list", lines)}");
        string file = Write("list", lines + "10.0.0.1 mon\n");
        Assert.Equal($"{file}:101: more than 100 different times in one file",
            Assert.Throws<FormatException>(() => Rule("allow", $"@{file}")).Message);
    }

    [Fact]
    public void A_file_without_end_is_refused()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "wants /dev/zero");
        Assert.Equal("/dev/zero is larger than 128 MB", Assert.Throws<FormatException>(() => Rule("allow", "@/dev/zero")).Message);
    }

    [Fact]
    public void A_file_of_two_rules_is_read_once_and_again_for_both()
    {
        string file = Write("list", "10.0.0.1\n");
        AccessRules rules = new();
        Settings settings = new();
        rules.Add(new AccessRule(isAllow: false, $"@{file} sun UTC", "--deny", settings.AccessFileOf));
        rules.Add(new AccessRule(isAllow: true, $"@{file}", "--allow", settings.AccessFileOf));
        AccessFile read = Assert.Single(settings.AccessFiles).Value;
        using Log silent = new(new LogSettings { Format = LogFormat.Off });
        Write("list", "10.0.0.2\n");
        Assert.True(rules.Judge(EndPointOf("10.0.0.1"), Noon).IsAllowed);
        read.Reload(silent);
        Assert.False(rules.Judge(EndPointOf("10.0.0.1"), Noon).IsAllowed);
        Assert.True(rules.Judge(EndPointOf("10.0.0.2"), Noon).IsAllowed);
        Write("list", "10.0.0.3\nx\n");
        read.Reload(silent);
        Assert.True(rules.Judge(EndPointOf("10.0.0.2"), Noon).IsAllowed); // the old list stays
        File.Delete(file);
        read.Reload(silent);
        Assert.True(rules.Judge(EndPointOf("10.0.0.2"), Noon).IsAllowed);
    }

    /// <summary>Random networks, many of which lie within each other, against a scan.</summary>
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void A_search_finds_what_a_scan_finds(int seed)
    {
        Random random = new(seed);
        for (int round = 0; round < 60; round++)
        {
            List<(IPNetwork Network, string When)> lines = [];
            for (int i = random.Next(1, 120); i > 0; i--)
            {
                lines.Add((RandomNetwork(random), random.Next(4) == 0 ? " mon UTC" : random.Next(8) == 0 ? " sun UTC" : ""));
            }

            string text = string.Concat(lines.Select(line => $"{line.Network}{line.When}\n"));
            string file = Write("list", text);
            AccessRule rule = Rule("allow", $"@{file}");
            for (int i = 0; i < 200; i++)
            {
                IPAddress client = random.Next(2) == 0 ? RandomNetwork(random).BaseAddress : RandomAddress(random);
                int found = rule.Find(Network.Of(new IPEndPoint(client, 0)), Noon);
                List<int> matches = [];
                for (int n = 0; n < lines.Count; n++)
                {
                    if (lines[n].When != " sun UTC" && lines[n].Network.Contains(client))
                    {
                        matches.Add(n);
                    }
                }

                Assert.True(matches.Count == 0 ? found == 0 : matches.Contains(found - 1), $"{client}: line {found} of\n{text}");
                if (found > 0)
                {
                    // of those with its schedule the widest, and of the same the first
                    int widest = matches.Where(n => lines[n].When == lines[found - 1].When).OrderBy(n => lines[n].Network.PrefixLength).First();
                    Assert.Equal(widest, found - 1);
                }
            }
        }
    }

    [Fact]
    public void A_million_networks_are_searched_in_less_than_a_microsecond_each()
    {
        Random random = new(1);
        StringBuilder text = new();
        List<IPAddress> some = [];
        Span<byte> bytes = stackalloc byte[16];
        for (int i = 0; i < 1_000_000; i++)
        {
            random.NextBytes(bytes);
            bytes[0] = 0x20;
            IPNetwork network = i % 4 == 0 ? new IPNetwork(new IPAddress(bytes), 64) : new IPNetwork(new IPAddress(bytes[4..8]), 32 - (i % 8));
            text.Append(network).Append('\n');
            if (i % 1000 == 0)
            {
                some.Add(network.BaseAddress);
                some.Add(new IPAddress(bytes[8..12]));
            }
        }

        string file = Write("million", text.ToString());
        AccessRule rule = Rule("deny", $"@{file}");
        Network[] clients = [.. some.Select(address => Network.Of(new IPEndPoint(address, 0)))];
        int found = 0;
        long best = long.MaxValue;
        for (int round = 0; round < 20; round++)
        {
            long start = System.Diagnostics.Stopwatch.GetTimestamp();
            foreach (Network client in clients)
            {
                found += rule.Find(client, Noon) > 0 ? 1 : 0;
            }

            best = Math.Min(best, System.Diagnostics.Stopwatch.GetTimestamp() - start);
        }

        Assert.True(found >= 20 * 1000, $"{found}");
        double each = best * 1e9 / System.Diagnostics.Stopwatch.Frequency / clients.Length;
        TestContext.Current.TestOutputHelper?.WriteLine($"{each:0} ns a look-up");
        Assert.InRange(each, 0, 1000);
    }

    [Fact]
    public void An_entry_of_a_list_takes_24_bytes() => Assert.Equal(24, System.Runtime.CompilerServices.Unsafe.SizeOf<Network>());

    // ---- moments

    [Theory]
    [InlineData("2026-11-23T08:30Z", "2026-11-23T08:30")]
    [InlineData("2026-11-23T08:30+02:00", "2026-11-23T06:30")]
    public void A_moment_is_a_date_and_a_time(string text, string expected)
    {
        DateTime utc = Units.ParseMoment(text);
        Assert.Equal((Utc(expected), DateTimeKind.Utc), (utc, utc.Kind));
    }

    [Fact]
    public void A_moment_without_a_zone_is_local()
    {
        DateTime utc = Units.ParseMoment("2026-07-01T08:30");
        Assert.Equal((new DateTime(2026, 7, 1, 8, 30, 0, DateTimeKind.Local).ToUniversalTime(), DateTimeKind.Utc), (utc, utc.Kind));
    }

    [Theory]
    [InlineData("")]
    [InlineData("08:30")]
    [InlineData("2026-11-23")]
    [InlineData("2026-11-23 08:30")]
    [InlineData("2026-02-30T08:30")]
    [InlineData("2026-11-23T24:00")]
    [InlineData("2026-11-23T08:30ZZ")]
    public void What_is_no_moment_is_said_to_be_none(string text) => Assert.Throws<FormatException>(() => Units.ParseMoment(text));

    private static DateTime Utc(string text) => DateTime.SpecifyKind(
        DateTime.ParseExact(text, "yyyy-MM-dd'T'HH:mm", CultureInfo.InvariantCulture), DateTimeKind.Utc);

    internal static EndPoint EndPointOf(string client) =>
        client == "unix" ? new UnixDomainSocketEndPoint("/x") : new IPEndPoint(IPAddress.Parse(client), 1234);

    private static AccessRule Rule(string verb, string text) => new(verb == "allow", text, $"--{verb}", new Settings().AccessFileOf);

    /// <summary>"deny 10.0.0.0/8; allow all"</summary>
    private static AccessRules Rules(string text)
    {
        AccessRules rules = new();
        foreach (string rule in text.Split("; ", StringSplitOptions.RemoveEmptyEntries))
        {
            string[] words = rule.Split(' ', 2);
            rules.Add(Rule(words[0], words[1]));
        }

        return rules;
    }

    /// <summary>Of few different bits, so that they meet.</summary>
    private static IPAddress RandomAddress(Random random)
    {
        byte[] bytes = random.Next(2) == 0 ? new byte[4] : [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (int i = bytes.Length - 3; i < bytes.Length; i++)
        {
            bytes[i] = (byte)(random.Next(4) * 0x55);
        }

        return new IPAddress(bytes);
    }

    private static IPNetwork RandomNetwork(Random random)
    {
        IPAddress address = RandomAddress(random);
        int bits = address.AddressFamily == AddressFamily.InterNetwork ? 32 : 128;
        return new IPNetwork(address, random.Next(10) == 0 ? random.Next(bits + 1) : bits - random.Next(24));
    }

    private string Write(string name, string text)
    {
        string path = Path.Combine(_folder, name);
        File.WriteAllText(path, text);
        return path;
    }
}
