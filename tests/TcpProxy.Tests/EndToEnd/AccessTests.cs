using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class AccessTests : EndToEndTest
{
    // ---- who

    [Fact(Timeout = Quick)]
    public async Task The_first_rule_that_matches_an_address_decides()
    {
        ProxyProcess proxy = await Given.Proxy(
            "*:0", "echo", "--deny", "127.1.2.0/24", "--allow", "127.1.0.0/16", "--deny", "127.0.0.0/8", "--allow", "::1");
        IPEndPoint v4 = new(IPAddress.Loopback, proxy.Port);
        await Expect(null, await From(v4, "127.1.9.9"));
        await Expect("rule --deny 127.1.2.0/24", await From(v4, "127.1.2.3"));
        await Expect("rule --deny 127.0.0.0/8", await From(v4, "127.2.2.3"));
        await Expect(null, await From(new IPEndPoint(IPAddress.IPv6Loopback, proxy.Port), "::1"));

        async Task Expect(string? reason, Peer client)
        {
            if (reason is null)
            {
                await client.Ask("hello");
                return;
            }

            await client.ExpectEnd();
            LogLine line = await proxy.Connection(client);
            Assert.Equal(("PR", reason, "-", "-", -1), (line.End, line.Reason, line["upstream"], line["server"], line.Number("connect_ms")));
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Whom_no_rule_allows_is_refused_where_some_are_allowed()
    {
        string file = Given.Write("conf",
            "deny 127.0.0.9\nlisten [::]:0\nupstream echo\nallow 127.0.0.0/8\nlisten 127.0.0.1:0\nupstream echo\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        Peer v6 = await Given.Client(new IPEndPoint(IPAddress.IPv6Loopback, proxy.PortOf(0)));
        await v6.ExpectEnd();
        Assert.Equal("no allow rule matches", (await proxy.Connection(v6)).Reason);
        for (int i = 0; i < 2; i++)
        {
            IPEndPoint v4 = new(IPAddress.Loopback, proxy.PortOf(i));
            await (await From(v4, "127.0.0.1")).Ask("hello");
            Peer ninth = await From(v4, "127.0.0.9");
            await ninth.ExpectEnd();
            LogLine line = await proxy.Line("connection", l => l["route"] == (i == 0 ? "[::]:0" : "127.0.0.1:0") && l["client"] == ninth.Local);
            Assert.Equal($"rule {file}:1: deny 127.0.0.9", line.Reason);
        }
    }

    [Theory(Timeout = Quick)]
    [InlineData("reset")]
    [InlineData("close")]
    public async Task Who_is_refused_is_closed_or_reset_as_is_asked_for(string way)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--deny", "127.9.0.0/16", "--refuse", way);
        Peer client = await From(proxy.Endpoint(), "127.9.0.1");
        await (way == "reset" ? client.ExpectReset() : client.ExpectEnd());
        Assert.Equal(("PR", "rule --deny 127.9.0.0/16"), ((await proxy.Connection(client)).End, (await proxy.Connection(client)).Reason));
        Assert.Equal(0, upstream.Accepted);
    }

    [Theory(Timeout = Quick)]
    [InlineData("--allow", "unix", true)]
    [InlineData("--deny", "unix", false)]
    [InlineData("--deny", "all", false)]
    [InlineData("--deny", "0.0.0.0/0", true)]
    [InlineData("--allow", "0.0.0.0/0", false)]
    public async Task Who_comes_by_a_unix_socket_is_unix(string option, string who, bool isAllowed)
    {
        ProxyProcess proxy = await Given.Proxy($"unix:{Given.Path("s")}", "echo", option, who);
        Peer client = await Given.Client(proxy);
        if (isAllowed)
        {
            await client.Ask("hello");
            return;
        }

        await client.ExpectEnd();
        Assert.Equal(option == "--deny" ? $"rule --deny {who}" : "no allow rule matches", (await proxy.Connection()).Reason);
    }

    [Fact(Timeout = Quick)]
    public async Task The_address_in_a_PROXY_header_is_the_one_that_is_judged()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--accept-proxy", "127.0.0.1", "--allow", "192.0.2.0/25", "--allow", "2001:db8::/32",
            "--deny", "127.0.0.1");
        await (await Sent("PROXY TCP4 192.0.2.1 192.0.2.9 11 80\r\n")).Ask("hello");
        await (await Sent("PROXY TCP6 2001:db8::1 2001:db8::9 12 80\r\n")).Ask("hello");
        await (await Sent("PROXY TCP6 ::ffff:192.0.2.1 ::1 13 80\r\n")).Ask("hello");
        await (await Sent("PROXY TCP4 192.0.2.200 192.0.2.9 14 80\r\n")).ExpectEnd();
        await (await Sent("PROXY TCP6 ::ffff:192.0.2.200 ::1 15 80\r\n")).ExpectEnd();
        Peer own = await Sent("PROXY UNKNOWN\r\n"); // speaks for itself
        await own.ExpectEnd();
        Peer direct = await From(proxy.Endpoint(), "127.0.0.2"); // no sender: no header is waited for
        await direct.ExpectEnd();
        Assert.Equal("no allow rule matches", (await proxy.Connection("192.0.2.200:14")).Reason);
        Assert.Equal("no allow rule matches", (await proxy.Connection("192.0.2.200:15")).Reason);
        Assert.Equal("rule --deny 127.0.0.1", (await proxy.Connection(own)).Reason);
        Assert.Equal("no allow rule matches", (await proxy.Connection(direct)).Reason);

        async Task<Peer> Sent(string header)
        {
            Peer client = await Given.Client(proxy);
            await client.Send(header);
            return client;
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Who_is_refused_is_neither_read_nor_queued_nor_counted()
    {
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "--sni", "example.com", "-u", "echo", "--deny", "127.9.0.0/16", "--preread-timeout", "50s",
            "-l", "127.0.0.1:0", "-u", "echo", "--deny", "127.9.0.0/16", "--max-connections", "1", "--queue", "5", "--queue-timeout", "50s",
            "-l", "127.0.0.1:0", "-u", "echo", "--deny", "127.9.0.0/16", "--connect-rate", "1/m 2");
        await (await Given.Client(proxy, 1)).Ask("takes the only place");
        for (int i = 0; i < 3; i++)
        {
            for (int n = 0; n < 5; n++)
            {
                Peer client = await From(proxy.Endpoint(i), "127.9.0.1");
                await client.ExpectEnd(5);
                Assert.Equal("rule --deny 127.9.0.0/16", (await proxy.Connection(client)).Reason);
            }
        }

        await (await Given.Client(proxy, 2)).Ask("one");
        await (await Given.Client(proxy, 2)).Ask("two");
        await (await Given.Client(proxy, 2)).ExpectEnd();
    }

    // ---- files

    [Fact(Timeout = Quick)]
    public async Task A_list_is_read_again_when_it_changes_and_a_bad_one_changes_nothing()
    {
        string list = Given.Write("list", "127.0.0.7 # seven\n");
        ProxyProcess proxy = (await Given.Proxy("127.0.0.1:0", "echo", "--deny", $"@{list}")).Tolerate("list");
        await Expect(7, 1);
        await (await From(proxy.Endpoint(), "127.0.0.8")).Ask("hello");

        Given.Write("list", "127.0.0.8\n# nine comes later\n127.0.0.8/29\n");
        await proxy.Line("list", l => l["message"] == $"{list}: read again" && l.Level == "info");
        await Expect(8, 3); // the widest
        await (await From(proxy.Endpoint(), "127.0.0.7")).Ask("hello");

        Given.Write("list", "127.0.0.7\n\n127.0.0.300\n");
        await proxy.Line("list", l => l.Level == "warn" && l["message"] == $"{list}:3: '127.0.0.300' is not a network; "
            + "write 10.0.0.0/8, 2001:db8::/32, an address or unix; the old list stays");
        await Expect(8, 3);

        File.Delete(list);
        await proxy.Line("list", l => l["message"] == $"cannot read {list}: no such file or directory; the old list stays");
        await Expect(8, 3);

        File.WriteAllText(list + ".new", "127.0.0.0/29\n");
        File.Move(list + ".new", list);
        await proxy.LinesOf("list", 2, l => l["message"] == $"{list}: read again");
        await Expect(7, 1);
        await Wait.Pause(2_500); // and what has not changed is left alone
        Assert.Equal(4, proxy.Lines.Count(l => l.Event == "list"));

        async Task Expect(int last, int line)
        {
            Peer client = await From(proxy.Endpoint(), $"127.0.0.{last}");
            await client.ExpectEnd();
            Assert.Equal($"rule --deny @{list} ({list}:{line})", (await proxy.Connection(client)).Reason);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_list_behind_links_is_read_again_when_it_or_a_link_changes()
    {
        Directory.CreateDirectory(Given.Path("one"));
        Directory.CreateDirectory(Given.Path("two"));
        Given.Write("one/list", "127.0.0.1\n");
        Given.Write("two/list", "127.0.0.33\n");
        Directory.CreateSymbolicLink(Given.Path("data"), "one"); // as Kubernetes lays out a ConfigMap
        File.CreateSymbolicLink(Given.Path("list"), "data/list");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--deny", $"@{Given.Path("list")}");
        await (await From(proxy.Endpoint(), "127.0.0.22")).Ask("hello");

        Given.Write("one/list", "127.0.0.22\n");
        await proxy.LinesOf("list", 1);
        await (await From(proxy.Endpoint(), "127.0.0.22")).ExpectEnd();

        Directory.CreateSymbolicLink(Given.Path("next"), "two");
        Directory.Move(Given.Path("data"), Given.Path("before"));
        Directory.Move(Given.Path("next"), Given.Path("data"));
        await proxy.Line("list", line => line.Level == "info" && proxy.Lines.Count(one => one.Event == "list") > 1);
        await (await From(proxy.Endpoint(), "127.0.0.33")).ExpectEnd();
        await (await From(proxy.Endpoint(), "127.0.0.22")).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task A_list_is_read_again_at_once_on_HUP()
    {
        string list = Given.Write("list", "127.0.0.7\n");
        ProxyProcess proxy = (await Given.Proxy("127.0.0.1:0", "echo", "--deny", $"@{list}", "--deny", $"@{list} mon")).Tolerate("list");
        await (await From(proxy.Endpoint(), "127.0.0.8")).Ask("hello");
        for (int i = 1; i < 4; i++)
        {
            Given.Write("list", $"127.0.0.{i}\n");
            Stopwatch clock = Stopwatch.StartNew();
            proxy.Signal(ProxyProcess.SigHup);
            await proxy.LinesOf("list", i);
            Assert.InRange(clock.ElapsedMilliseconds, 0, 900);
            await (await From(proxy.Endpoint(), $"127.0.0.{i}")).ExpectEnd();
            await (await From(proxy.Endpoint(), "127.0.0.7")).Ask("hello");
        }

        Given.Write("list", "nobody\n");
        proxy.Signal(ProxyProcess.SigHup);
        await proxy.Line("list", l => l.Level == "warn" && l["message"].StartsWith($"{list}:1: 'nobody'", StringComparison.Ordinal));
        await (await From(proxy.Endpoint(), "127.0.0.3")).ExpectEnd();
    }

    [Fact(Timeout = Quick)]
    public async Task A_list_that_is_being_written_is_left_alone()
    {
        string list = Given.Write("list", "127.0.0.7\n");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--deny", $"@{list}");
        StringBuilder text = new();
        for (int i = 0; i < 15; i++)
        {
            Given.Write("list", text.Append(CultureInfo.InvariantCulture, $"127.0.1.{i}\n").ToString());
            await Wait.Pause(200);
        }

        Assert.DoesNotContain(proxy.Lines, l => l.Event == "list");
        await (await From(proxy.Endpoint(), "127.0.0.7")).ExpectEnd();
        Given.Write("list", text.Append("127.0.2.1\n").ToString());
        await proxy.Line("list");
        await (await From(proxy.Endpoint(), "127.0.2.1")).ExpectEnd();
        Assert.Single(proxy.Lines, l => l.Event == "list");
    }

    [Fact(Timeout = Quick)]
    public async Task A_bad_list_starts_nothing()
    {
        string list = Given.Write("list", "127.0.0.1\n127.0.0.1/8\n");
        Outcome outcome = await Tool.Proxy("127.0.0.1:0", "echo", "--deny", $"@{list}");
        Assert.Equal(
            (2, $"tcpproxy: error: --deny: {list}:2: '127.0.0.1/8' has bits beyond its prefix; did you mean '127.0.0.0/8'?\n"),
            (outcome.Status, outcome.Err));
        string file = Given.Write("conf", $"listen 127.0.0.1:0\nupstream echo\nallow @{list} mon-fri\n");
        outcome = await Tool.Proxy("-c", file, "--check-config");
        Assert.Equal(
            (2, $"tcpproxy: error: {file}:3: allow: {list}:2: '127.0.0.1/8' has bits beyond its prefix; did you mean '127.0.0.0/8'?\n"),
            (outcome.Status, outcome.Err));
    }

    [Fact(Timeout = Quick)]
    public async Task A_million_networks_are_read_in_two_seconds_and_take_64_MB()
    {
        Tool.NeedLibc("the memory is that of the native binary");
        Random random = new(1);
        StringBuilder text = new();
        for (int i = 0; i < 1_000_000; i++)
        {
            text.Append(i % 4 == 0
                ? $"2001:{random.Next(65536):x}:{random.Next(65536):x}:{random.Next(65536):x}::/64\n"
                : $"{random.Next(1, 126)}.{random.Next(256)}.{random.Next(256)}.{random.Next(64) * 4}/{30 + (i % 3)}\n");
        }

        string list = Given.Write("million", text.Append("127.9.8.0/24\n").ToString());
        string said = (await Tool.Proxy("127.0.0.1:0", "echo", "--deny", $"@{list}", "--explain", "127.9.8.7")).Good();
        Assert.Contains($"\n  denied: rule --deny @{list} ({list}:1000001)\n", said, StringComparison.Ordinal);

        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--deny", $"@{list}");
        Assert.InRange(proxy.Processor, 0, 2_000); // of processor time: how long it takes depends on who else is here
        await (await From(proxy.Endpoint(), "127.9.8.7")).ExpectEnd();
        TestContext.Current.TestOutputHelper?.WriteLine($"{proxy.Resident >> 20} MB");
        Assert.InRange(proxy.Resident, 0, 64 << 20);
        for (int i = 1; i < 4; i++)
        {
            proxy.Signal(ProxyProcess.SigHup);
            await proxy.LinesOf("list", i);
            await (await From(proxy.Endpoint(), "127.9.9.9")).Ask("hello");
            Assert.InRange(proxy.Resident, 0, 80 << 20);
        }
    }

    // ---- when

    [Fact(Timeout = Slow)]
    public async Task At_the_end_of_its_window_a_client_is_reset_where_that_is_asked_for_and_new_ones_are_refused()
    {
        DateTime end = DateTime.UtcNow.AddSeconds(5);
        end = new DateTime(end.Year, end.Month, end.Day, end.Hour, end.Minute, 0, DateTimeKind.Utc).AddMinutes(1);
        string list = Given.Write("list", "");
        string rule = $"127.0.0.0/8 {end.AddMinutes(-3):HH':'mm}-{end:HH':'mm} UTC";
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", "echo", "--allow", rule, "--close-at-window-end",
            "-l", "127.0.0.1:0", "-u", "echo", "--allow", rule,
            "-l", "127.0.0.1:0", "-u", "echo", "--deny", "127.3.0.0/16", "--allow", "all", "--close-at-window-end",
            "-l", "127.0.0.1:0", "-u", "echo", "--accept-proxy", "127.0.0.1", "--allow", "192.0.2.1 " + rule.Split(' ', 2)[1],
            "--allow", "192.0.2.2", "--close-at-window-end",
            "-l", "127.0.0.1:0", "-u", "echo", "--deny", $"@{list}", "--close-at-window-end");
        Peer listed = await From(proxy.Endpoint(4), "127.0.0.7");
        Peer other = await From(proxy.Endpoint(4), "127.0.0.8");
        await listed.Ask("hello");
        await other.Ask("hello");
        Given.Write("list", "127.0.0.7\n");
        proxy.Signal(ProxyProcess.SigHup);
        Peer[] clients = new Peer[5];
        for (int i = 0; i < 5; i++)
        {
            clients[i] = await Given.Client(proxy, Math.Min(i, 3));
            if (i >= 3)
            {
                await clients[i].Send($"PROXY TCP4 192.0.2.{i - 2} 192.0.2.9 1{i} 80\r\n");
            }

            await clients[i].Ask("hello");
        }

        await clients[0].ExpectReset(75);
        TimeSpan late = DateTime.UtcNow - end;
        Assert.InRange(late.TotalSeconds, -0.1, 5);
        LogLine line = await proxy.Connection(clients[0]);
        Assert.Equal(("PD", $"window end: no allow rule matches", 5, 5), (line.End, line.Reason, line.BytesUp, line.BytesDown));
        await clients[3].ExpectReset(5); // the address in the header counts
        Assert.Equal("window end: no allow rule matches", (await proxy.Connection("192.0.2.1:13")).Reason);
        await listed.ExpectReset(5); // a list that has changed counts as well
        Assert.Equal($"window end: rule --deny @{list} ({list}:1)", (await proxy.Connection(listed)).Reason);
        await other.Ask("still here");
        await clients[1].Ask("was not asked for");
        await clients[2].Ask("is still allowed");
        await clients[4].Ask("is still allowed");
        for (int i = 0; i < 2; i++)
        {
            await (await Given.Client(proxy, i)).ExpectEnd();
        }
    }

    // ---- --explain

    [Fact(Timeout = Quick)]
    public async Task Explain_says_for_each_route_what_becomes_of_a_client_and_why()
    {
        string list = Given.Write("list", "# comment\n10.0.0.0/8\n");
        string file = Given.Write(
            "conf",
            $"""
            max-connections 100
            deny @{list}
            listen 127.0.0.1:7001 # the first
            name web
            upstream 10.0.0.1:80 weight=2
            upstream 10.0.0.2:80
            upstream 10.0.0.3:80 backup
            balance source
            max-connections-per-ip 5
            listen 127.0.0.1:7002
            upstream nosuchhost.example:80
            upstream 10.0.0.4:80
            allow 192.0.2.0/24 mon-fri 09:00-17:30 Europe/Berlin
            connect-rate 10/s 20
            listen 127.0.0.1:7003
            upstream 10.0.0.5:80
            upstream 10.0.0.6:80
            allow all

            """);
        string said = (await Tool.Proxy("-c", file, "--explain", "192.0.2.7@2026-11-23T08:30Z")).Good();
        Assert.Equal(
            $"""
            client 192.0.2.7 at 2026-11-23T08:30:00.000Z

            route web
              allowed: no rule matches
              server: ONE, by the client's address, of 10.0.0.1:80 weight=2, 10.0.0.2:80, 10.0.0.3:80 backup
              --balance source
              --max-connections 100
              --max-connections-per-ip 5

            route 127.0.0.1:7002
              allowed: rule {file}:13: allow 192.0.2.0/24 mon-fri 09:00-17:30 Europe/Berlin
              server: not known without a look-up, of nosuchhost.example:80, 10.0.0.4:80
              --max-connections 100
              --connect-rate 10/s 20

            route 127.0.0.1:7003
              allowed: rule {file}:18: allow all
              server: 10.0.0.5:80, while all are idle, of 10.0.0.5:80, 10.0.0.6:80
              --max-connections 100

            """,
            Regex.Replace(said, "server: 10.0.0.[12]:80, by", "server: ONE, by"));

        said = (await Tool.Proxy("-c", file, "--explain", "192.0.2.7@2026-11-23T07:59Z")).Good();
        Assert.Contains("\nroute 127.0.0.1:7002\n  denied: no allow rule matches\n\nroute", said, StringComparison.Ordinal);
        said = (await Tool.Proxy("-c", file, "--explain", "::ffff:10.1.2.3")).Good();
        Assert.Equal(3, said.Split($"  denied: rule {file}:2: deny @{list} ({list}:2)\n").Length - 1);
        said = (await Tool.Proxy("-c", file, "--explain", "unix", "--deny", "unix mon UTC")).Good();
        Assert.StartsWith("client unix at 2", said, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task The_server_that_explain_names_is_the_one_that_a_client_gets()
    {
        Upstream[] servers = [.. Enumerable.Range(0, 5).Select(i => Given.Named($"s{i}"))];
        string[] words = ["127.0.0.1:0", .. servers.Select(s => s.Address), "--balance", "source"];
        ProxyProcess proxy = await Given.Proxy(words);
        HashSet<string> seen = [];
        for (int i = 1; i <= 10; i++)
        {
            string said = (await Tool.Proxy([.. words, "--explain", $"127.0.{i}.1"])).Good();
            Peer client = await From(proxy.Endpoint(), $"127.0.{i}.1");
            string name = await client.ReceiveLine();
            Assert.Contains($"server: {servers[name[1] - '0'].Address}, by the client's address", said, StringComparison.Ordinal);
            seen.Add(name);
        }

        Assert.True(seen.Count > 1, "all the same");
    }

    /// <summary>Moments of the nights in which clocks change, as they show there (TZ) and in UTC.</summary>
    [Theory(Timeout = Quick)]
    [InlineData("02:00-03:00 Europe/Berlin", "UTC", "2026-03-29T00:59", false)]
    [InlineData("02:00-03:00 Europe/Berlin", "UTC", "2026-03-29T01:00", false)] // 03:00 there
    [InlineData("01:00-02:00 Europe/Berlin", "UTC", "2026-03-29T00:59Z", true)]
    [InlineData("03:00-04:00 Europe/Berlin", "UTC", "2026-03-29T01:00Z", true)]
    [InlineData("02:00-03:00 Europe/Berlin", "UTC", "2026-10-25T00:00Z", true)]
    [InlineData("02:00-03:00 Europe/Berlin", "UTC", "2026-10-25T01:59Z", true)] // the second time
    [InlineData("02:00-03:00 Europe/Berlin", "UTC", "2026-10-25T02:00Z", false)]
    [InlineData("02:00-03:00 America/New_York", "UTC", "2026-03-08T07:00Z", false)]
    [InlineData("03:00-04:00 America/New_York", "UTC", "2026-03-08T07:00Z", true)]
    [InlineData("01:00-02:00 America/New_York", "UTC", "2026-11-01T05:00Z", true)]
    [InlineData("01:00-02:00 America/New_York", "UTC", "2026-11-01T06:59Z", true)]
    [InlineData("01:00-02:00 America/New_York", "UTC", "2026-11-01T07:00Z", false)]
    [InlineData("01:00-02:00", "America/New_York", "2026-11-01T06:30Z", true)] // a rule without a zone is local
    [InlineData("sun 01:00-02:00", "Europe/Berlin", "2026-10-25T01:59", true)] // and so is a time
    [InlineData("sun 01:00-02:00", "Europe/Berlin", "2026-10-24T23:30Z", true)]
    [InlineData("sat 22:00-03:00", "Europe/Berlin", "2026-10-25T02:59", true)]
    [InlineData("sat 22:00-03:00", "Europe/Berlin", "2026-10-25T03:00", false)]
    [InlineData("sat 22:00-03:00", "Europe/Berlin", "2026-10-24T20:00Z", true)]
    public async Task Explain_is_right_in_the_nights_in_which_clocks_change(string when, string zone, string time, bool isAllowed)
    {
        Assert.SkipUnless(File.Exists("/usr/share/zoneinfo/Europe/Berlin"), "no time zones: apt-get install tzdata");
        string said = (await Tool.Run("env", $"TZ={zone}", ProxyProcess.Binary, "127.0.0.1:0", "echo",
            "--allow", $"10.0.0.0/8 {when}", "--explain", $"10.0.0.1@{time}")).Good();
        Assert.Contains(isAllowed ? "allowed: rule" : "denied: no allow", said, StringComparison.Ordinal);
    }

    // ---- real addresses

    [Fact(Timeout = Slow)]
    public async Task Clients_of_another_network_are_judged_by_their_addresses()
    {
        Tool.NeedRoot("network namespaces");
        string ip = Tool.Need("ip", "iproute2");
        string socat = Tool.Need("socat", "socat");
        string[] spaces = [$"tcpproxy-p{Environment.ProcessId}", $"tcpproxy-c{Environment.ProcessId}"];
        Outcome tried = await Tool.Run(ip, "netns", "add", spaces[0]);
        Assert.SkipUnless(tried.Status == 0, $"no network namespaces here: {tried.Err}");
        Given.AtEnd(() => Tool.Run(ip, "netns", "del", spaces[0]));
        (await Tool.Run(ip, "netns", "add", spaces[1])).Good();
        Given.AtEnd(() => Tool.Run(ip, "netns", "del", spaces[1]));
        tried = await Tool.Run(ip, "-n", spaces[0], "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", spaces[1]);
        Assert.SkipUnless(tried.Status == 0, $"no veth here: {tried.Err}");
        foreach ((string space, string link, string[] addresses) in new[]
        {
            (spaces[0], "near", new[] { "192.0.2.1/24", "2001:db8::1/64" }),
            (spaces[1], "far", ["192.0.2.7/24", "192.0.2.8/24", "2001:db8::7/64", "2001:db8::8/64"]),
        })
        {
            foreach (string address in addresses)
            {
                string[] quick = address.Contains(':', StringComparison.Ordinal) ? ["nodad"] : [];
                (await Tool.Run(ip, ["-n", space, "address", "add", address, "dev", link, .. quick])).Good();
            }

            (await Tool.Run(ip, "-n", space, "link", "set", link, "up")).Good();
        }

        Launch launch = new() { Before = [ip, "netns", "exec", spaces[0]] };
        ProxyProcess proxy = await Given.Proxy(
            launch, "*:0", "echo", "--deny", "192.0.2.8", "--deny", "2001:db8::8/125", "--allow", "192.0.2.0/24", "--allow", "2001:db8::/64");
        Assert.Equal("hello", await Ask("TCP4:192.0.2.1", "192.0.2.7"));
        Assert.Equal("", await Ask("TCP4:192.0.2.1", "192.0.2.8"));
        Assert.Equal("hello", await Ask("TCP6:[2001:db8::1]", "[2001:db8::7]"));
        Assert.Equal("", await Ask("TCP6:[2001:db8::1]", "[2001:db8::8]"));
        List<LogLine> lines = await proxy.LinesOf("connection", 4);
        Assert.Equal(
            ["192.0.2.7 done", "192.0.2.8 rule --deny 192.0.2.8", "[2001:db8::7] done", "[2001:db8::8] rule --deny 2001:db8::8/125"],
            lines.Select(l => $"{l["client"][..l["client"].LastIndexOf(':')]} {l.Reason}"));

        async Task<string> Ask(string to, string from) => (await Tool.Run(
            ip, ["netns", "exec", spaces[1], socat, "-t5", "-T10", "-", $"{to}:{proxy.Port},bind={from}"], 30, input: "hello")).Out;
    }

    private Task<Peer> From(EndPoint to, string address) => Given.Client(to, new IPEndPoint(IPAddress.Parse(address), 0));
}
