using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--control, as HAProxy's users speak to it: with socat. And --ctl, which is there where socat is not.</summary>
public sealed class ControlTests : EndToEndTest
{
    private string Control => Given.Path("control");

    // ---- the socket

    [Fact(Timeout = Quick)]
    public async Task The_socket_is_its_owners_alone_and_one_that_a_dead_process_left_is_replaced()
    {
        using (Socket dead = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            dead.Bind(new UnixDomainSocketEndPoint(Control));
        }

        Launch open = Launch.FromShell("umask 0");
        ProxyProcess proxy = await Given.Proxy(open, "--control", $"unix:{Control}", "127.0.0.1:0", "echo");
        Assert.Equal("600\n", (await Tool.Run("stat", "-c", "%a", Control)).Good());
        Assert.Single(proxy.Addresses); // it is none of those that clients come to
        Assert.StartsWith("Name: tcpproxy\n", await Say("show info"), StringComparison.Ordinal);

        Outcome second = await Tool.Proxy("--control", $"unix:{Control}", "127.0.0.1:0", "echo");
        Assert.Equal((1, $"tcpproxy: error: --control: cannot listen on unix:{Control}: address already in use"),
            (second.Status, second.ErrLines[^1]));
        Assert.NotEmpty(await Say("show info"));

        await proxy.Stop();
        Assert.False(File.Exists(Control));
    }

    [Theory(Timeout = Quick)]
    [InlineData("--control 8080", "--control: '8080' is no path of a unix socket; write unix:PATH")]
    [InlineData("--control /run/x", "--control: '/run/x' has no port; an address is HOST:PORT")]
    [InlineData("--ctl", "--ctl: needs a value PATH COMMAND...")]
    [InlineData("--ctl /run/x", "--ctl: no command follows; 'help' lists them")]
    public async Task What_is_no_control_socket_is_said(string words, string error)
    {
        Outcome outcome = await Tool.Proxy([.. words.Split(' '), .. words.StartsWith("--ctl", StringComparison.Ordinal)
            ? Array.Empty<string>() : ["127.0.0.1:0", "echo"]]);
        Assert.Equal((2, $"tcpproxy: error: {error}"), (outcome.Status, outcome.ErrLines[0]));
    }

    // ---- what it shows, beside HAProxy

    [Fact(Timeout = Quick)]
    public async Task The_counters_have_HAProxys_columns_and_what_a_csv_parser_reads_is_so()
    {
        string haproxy = await HAProxy();
        Upstream a = Given.Echo();
        ProxyProcess proxy = await Start(
            "-l", "127.0.0.1:0", "--name", "web, \"1\"", "-u", a.Address, "name=a", "weight=10", "max-connections=9", "-u",
            $"127.0.0.1:{Given.RefusingPort()}", "name=b", "-u", Given.Echo().Address, "name=c", "backup",
            "--check", "2s", "--check-fall", "1", "--check-rise", "1", "--max-connections", "50", "--queue", "7",
            "-l", "127.0.0.1:0", "--name", "other", "-u", "echo");
        proxy.Tolerate("server");
        await proxy.Line("server", line => line["state"] == "down");
        await Wait.Until(() => Rows(Say("show stat -1 4 1").GetAwaiter().GetResult())[0]["last_chk"] == "passed", "a check that passed");
        Peer first = await Given.Client(proxy);
        Peer second = await Given.Client(proxy);
        await first.Ask("0123456789");
        await second.Ask("01234");
        second.Finish();
        await second.ExpectEnd();
        await proxy.Connection(second);

        string theirs = (await Say("show stat", haproxy)).Split('\n')[0];
        string text = await Say("show stat");
        Assert.Equal(theirs, text.Split('\n')[0]);
        List<Dictionary<string, string>> rows = Rows(text);
        Assert.Equal(
            ["web, \"1\"/FRONTEND", "web, \"1\"/a", "web, \"1\"/b", "web, \"1\"/c", "web, \"1\"/BACKEND", "other/FRONTEND",
                "other/echo", "other/BACKEND"],
            rows.Select(r => $"{r["pxname"]}/{r["svname"]}"));
        Assert.Equal(["OPEN", "UP", "DOWN", "UP", "UP", "OPEN", "no check", "UP"], rows.Select(r => r["status"]));
        Assert.Equal(["0", "2", "2", "2", "1", "0", "2", "1"], rows.Select(r => r["type"]));
        Assert.Equal("50 2 1 2 15 15", Of(rows[0], "slim stot scur smax bin bout"));
        Assert.Equal("9 2 1 15 15 10 10 1 0 2 1", Of(rows[1], "slim stot scur bin bout weight uweight act bck lbtot sid"));
        Assert.Equal($"{a.Address} passed 0", Of(rows[1], "addr last_chk chkdown"));
        Assert.Equal("connection_refused 1 1", Of(rows[2], "last_chk chkdown act"));
        Assert.Equal("0 1", Of(rows[3], "act bck"));
        Assert.Equal("50 7 2 15 15 1 1 0 leastconn", Of(rows[4], "slim qlimit stot bin bout act bck qcur algo"));

        Assert.Equal(["b"], Rows(await Say("show stat 1 4 2")).Select(r => r["svname"]));
        Assert.Equal(["FRONTEND", "BACKEND"], Rows(await Say("show stat other 3 -1")).Select(r => r["svname"]));
        Assert.Equal(["a", "b", "c", "echo"], Rows(await Say("show stat -1 4 -1")).Select(r => r["svname"]));
        Assert.StartsWith("usage: show stat", await Say("show stat json"), StringComparison.Ordinal);

        HashSet<string> keys = [.. Lines(await Say("show info", haproxy)).Select(line => line.Split(':')[0])];
        Dictionary<string, string> info = Lines(await Say("show info")).ToDictionary(l => l.Split(": ")[0], l => l.Split(": ")[1]);
        Assert.Subset(keys, info.Keys.ToHashSet());
        Assert.Equal(($"{proxy.Id}", "1", "2", "30", "0", "2"), (info["Pid"], info["CurrConns"], info["CumConns"],
            info["TotalBytesOut"], info["Stopping"], info["Listeners"]));

        Assert.Equal((await Say("show servers state", haproxy)).Split('\n')[..2], (await Say("show servers state")).Split('\n')[..2]);
        string[] state = Lines(await Say("show servers state other"))[2].Split(' ');
        Assert.Equal("2 other 1 echo echo 2 0 1 1", string.Join(' ', state[..9]));
        Assert.Equal(25, state.Length);
    }

    // ---- servers

    [Fact(Timeout = Quick)]
    public async Task A_drained_server_keeps_its_connections_and_gets_no_other_until_it_is_ready()
    {
        ProxyProcess proxy = await Two("--balance", "roundrobin", "--check", "1s");
        Peer[] early = [await Given.Client(proxy), await Given.Client(proxy)];
        Assert.Equal(["a", "b"], (await Task.WhenAll(early.Select(client => client.ReceiveLine()))).Order());

        Assert.Equal("\n", await Say("set server web/a state drain"));
        Assert.Equal(("drain", "control", "info"), Of(await proxy.Line("server", l => l["server"] == "a")));
        Assert.Equal("bbbbbb", string.Concat(await Served(proxy, 6)));
        await Task.WhenAll(early.Select(client => client.Ask("still here")));
        Assert.Equal(["DRAIN", "UP"], Rows(await Say("show stat web 4 -1")).Select(r => r["status"]));
        Assert.Equal("2 8 1 1", string.Join(' ', Lines(await Say("show servers state"))[2].Split(' ')[5..9]));

        await Say("set server web/a state ready");
        Assert.Equal(["a", "b"], (await Served(proxy, 2)).Order());
        Assert.Equal(["UP", "UP"], Rows(await Say("show stat web 4 -1")).Select(r => r["status"]));

        // the short words
        Assert.Equal("\n\n", await Say("disable server web/b;set server web/a weight 3"));
        Assert.Equal("aaaa", string.Concat(await Served(proxy, 4)));
        Assert.Equal(["UP", "MAINT"], Rows(await Say("show stat web 4 -1")).Select(r => r["status"]));
        await Say("enable server web/b");
        Assert.Equal("aaab", string.Concat((await Served(proxy, 4)).Order()));
    }

    [Fact(Timeout = Quick)]
    public async Task Nobody_checks_a_server_in_maintenance_and_it_comes_back_up_with_a_share_that_grows()
    {
        int checks = 0;
        Upstream checkedOne = Given.Server(async peer =>
        {
            checks++;
            await Upstream.EchoAsync(peer);
        });
        ProxyProcess proxy = await Start(
            "--name", "web", "127.0.0.1:0", checkedOne.Address, "name=a", "slow-start=1m", Given.Named("b").Address, "name=b",
            "--check", "200ms", "--balance", "roundrobin");
        await Wait.Until(() => checks > 3, "checks");
        await Say("set server web/a state drain");
        int before = checks;
        await Wait.Until(() => checks > before + 3, "checks of a drained server");
        await Say("set server web/a state maint");
        before = (int)await Wait.UntilStill(() => checks, "the checks of a server in maintenance");

        await Say("set server web/a state ready");
        await Wait.Until(() => checks > before + 3, "checks again");
        Dictionary<string, string> a = Rows(await Say("show stat web 4 1"))[0];
        Assert.Equal("UP", a["status"]);
        Assert.InRange(int.Parse(a["throttle"], CultureInfo.InvariantCulture), 1, 50);
        await proxy.Stop(); // before its servers: checks would find them down
    }

    [Fact(Timeout = Quick)]
    public async Task Clients_of_servers_that_are_all_out_are_refused_and_none_is_tried_all_the_same()
    {
        ProxyProcess proxy = await Two("--retries", "9");
        await Say("set server web/a state maint;set server web/b state drain");
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("SC", "no server", "-"), (line.End, line.Reason, line["server"]));
        Assert.Equal("DOWN 0 0", Of(Rows(await Say("show stat web 2 -1"))[0], "status act weight"));
        await Say("set server web/b state ready");
        Assert.Equal(["b"], await Served(proxy, 1));

        // a lone one as well, by weight too
        ProxyProcess lone = await Start("--name", "lone", "127.0.0.1:0", Given.Named("c").Address);
        Assert.Equal(["c"], await Served(lone, 1));
        string server = Rows(await Say("show stat lone 4 -1"))[0]["svname"];
        await Say($"set server lone/{server} weight 0");
        await (await Given.Client(lone)).ExpectReset();
        await Say($"set server lone/{server} weight 100%;set server lone/{server} state drain");
        await (await Given.Client(lone)).ExpectReset();
        await Say($"set server lone/{server} state ready");
        Assert.Equal(["c"], await Served(lone, 1));
    }

    [Fact(Timeout = Slow)]
    public async Task No_connection_fails_while_servers_are_drained_and_come_back_under_load()
    {
        ProxyProcess proxy = await Two("--check", "1s", "--log-level", "warn"); // a check that is late would be told
        bool isOver = false;
        int served = 0;
        Task load = Wait.Apart(() => Wait.Many(8, 8, async _ =>
        {
            while (!Volatile.Read(ref isOver))
            {
                using Peer client = await Peer.Connect(proxy.Endpoint());
                Assert.Contains(await client.ReceiveLine(), new[] { "a", "b" });
                await client.Ask("a question");
                client.Finish();
                await client.ExpectEnd();
                Interlocked.Increment(ref served);
            }
        }));
        string[] modes = ["drain", "ready", "maint", "ready", "drain", "maint", "ready"];
        for (int i = 0; i < 6 * modes.Length; i++)
        {
            Assert.Equal("\n", await Say($"set server web/{"ab"[i / modes.Length % 2]} state {modes[i % modes.Length]}"));
            int before = Volatile.Read(ref served);
            await Wait.Until(() => load.IsCompleted || Volatile.Read(ref served) > before + 10, "clients that are served");
        }

        Volatile.Write(ref isOver, true);
        await load;
        List<Dictionary<string, string>> rows = Rows(await Say("show stat"));
        Assert.Equal($"{served} 0", Of(rows[^1], "stot econ"));
        Assert.All(rows.Where(r => r["type"] == "2"), r => Assert.NotEqual("0", r["stot"]));
        await proxy.Stop(); // before its servers: checks would find them down
    }

    [Fact(Timeout = Quick)]
    public async Task A_weight_shifts_the_picks_in_percent_of_what_was_typed_too()
    {
        ProxyProcess proxy = await Two("--balance", "roundrobin", "-u", Given.Named("c").Address, "name=c", "weight=40");
        Assert.Equal("40 (initial 40)\n\n", await Say("get weight web/c"));
        Assert.Equal("\n", await Say("set server web/c weight 5%"));
        Assert.Equal("2 (initial 40)\n\n", await Say("get weight web/c"));
        Assert.Equal("aabbcccc", string.Concat((await Served(proxy, 8)).Order()));
        await Say("set weight web/c 0; set server web/a weight 3");
        Assert.Equal("aaaaaabb", string.Concat((await Served(proxy, 8)).Order()));
        Assert.Equal(["3", "1", "0"], Rows(await Say("show stat web 4 -1")).Select(r => r["weight"]));
        await Say("set server web/c weight 100%");
        Assert.Equal("40 (initial 40)\n\n", await Say("get weight web/c"));
    }

    [Fact(Timeout = Quick)]
    public async Task With_balance_source_nobody_moves_but_the_clients_of_the_drained_server()
    {
        string[] servers = [.. "abcde".SelectMany(name => new[] { Given.Named($"{name}").Address, $"name={name}", "slow-start=off" })];
        ProxyProcess proxy = await Start(["--name", "web", "127.0.0.1:0", "--balance", "source", .. servers]);
        string[] before = await Sources();
        await Say("set server web/c state drain");
        string[] during = await Sources();
        Assert.Equal(before.Select(s => s != "c"), before.Zip(during, (old, now) => old == now));
        Assert.True(during.Where((_, i) => before[i] == "c").Distinct().Count() > 1, "all of them moved to one server");
        await Say("set server web/c state ready");
        Assert.Equal(before, await Sources());
        Assert.Contains("c", before);

        async Task<string[]> Sources()
        {
            string[] names = new string[80];
            await Wait.Many(80, 8, async i =>
            {
                using Peer client = await Peer.Connect(proxy.Endpoint(), new IPEndPoint(IPAddress.Parse($"127.1.4.{i + 1}"), 0));
                names[i] = await client.ReceiveLine();
            });
            return names;
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Every_address_of_a_name_is_meant_by_its_name()
    {
        ProxyProcess proxy = await Start(
            "-l", "127.0.0.1:0", "--name", "web", "-u", $"localhost:{Given.RefusingPort()}", "name=one", "-u", "echo",
            "-l", "127.0.0.1:0", "--name", "unix:/x", "-u", $"unix:{Given.Path("no/such")}");
        Assert.Equal("\n", await Say("set server web/one state drain"));
        Assert.Equal("\n", await Say($"set server unix:/x/unix:{Given.Path("no/such")} weight 7"));
        Assert.Equal("7 (initial 1)\n\n", await Say($"get weight unix:/x/unix:{Given.Path("no/such")}"));
        Peer client = await Given.Client(proxy);
        await client.Ask("echo, at once");
    }

    // ---- limits

    [Fact(Timeout = Quick)]
    public async Task Limits_can_be_set_where_there_were_none_and_who_waits_gets_the_place()
    {
        ProxyProcess proxy = await Two("--queue", "5", "--queue-timeout", "30s");
        await Say("set maxconn server web/a 1;set maxconn server web/b 1");
        Peer[] clients = [await Given.Client(proxy), await Given.Client(proxy), await Given.Client(proxy)];
        await Wait.Until(() => Column("qcur", "BACKEND") == "1", "a client in the queue");
        Assert.Equal("1", Column("slim", "a"));
        await Say("set maxconn server web/a 2");
        await Task.WhenAll(clients.Select(client => client.ReceiveLine()));

        await Say("set maxconn frontend web 3");
        Peer fourth = await Given.Client(proxy);
        await Wait.Until(() => Column("qcur", "BACKEND") == "1", "a client in the queue of the route");
        Assert.Equal("3", Column("slim", "FRONTEND"));
        await Say("set maxconn frontend web 0;set maxconn server web/b 0");
        await fourth.ReceiveLine();

        await Say("set maxconn global 4");
        Assert.Contains("Maxconn: 4", await Say("show info"), StringComparison.Ordinal);
        Peer fifth = await Given.Client(proxy);
        await Wait.Until(() => Column("qcur", "BACKEND") == "1", "a client that the process has no place for");
        await Say("set maxconn global 0");
        await fifth.ReceiveLine();

        string Column(string column, string server) =>
            Rows(Say("show stat").GetAwaiter().GetResult()).Single(r => r["svname"] == server)[column];
    }

    // ---- sessions

    [Fact(Timeout = Quick)]
    public async Task A_session_is_shut_down_by_its_id_and_no_other_is_touched()
    {
        ProxyProcess proxy = await Two("--balance", "roundrobin");
        Peer[] clients = new Peer[4];
        for (int i = 0; i < 4; i++)
        {
            clients[i] = await Given.Client(proxy);
            await clients[i].ReceiveLine();
        }

        await clients[2].Ask("12345");
        string[] sessions = Lines(await Say("show sess"));
        Assert.Equal(4, sessions.Length);
        for (int i = 0; i < 4; i++)
        {
            Assert.Matches($@"^0x[0-9a-f]+: proto=tcpv4 src={clients[i].Local} fe=web be=web srv=[ab] age=\ds idle=\ds up=\d down=\d$",
                sessions[i]);
        }

        Assert.EndsWith(" up=5 down=7", sessions[2], StringComparison.Ordinal);
        string id = sessions[2].Split(':')[0];
        Assert.StartsWith(sessions[2].Split(" age=")[0], await Say($"show sess {id}"), StringComparison.Ordinal);
        Assert.Equal("\n", await Say($"shutdown session {id}"));
        await clients[2].ExpectReset();
        LogLine line = await proxy.Connection(clients[2]);
        Assert.Equal(("KD", "shut down by control", 5L, 7L), (line.End, line.Reason, line.BytesUp, line.BytesDown));
        Assert.Equal("No such session (use 'show sess').\n\n", await Say($"shutdown session {id}"));
        Assert.Equal("Session not found.\n\n", await Say($"show sess {id}"));
        await Task.WhenAll(clients.Where((_, i) => i != 2).Select(client => client.Ask("untouched")));

        // all of a server
        string mine = Lines(await Say("show sess"))[0].Split(' ').Single(word => word.StartsWith("srv=", StringComparison.Ordinal))[4..];
        Assert.Equal("\n", await Say($"shutdown sessions server web/{mine}"));
        await clients[0].ExpectReset();
        await proxy.Connection(clients[0]);
        string[] left = Lines(await Say("show sess"));
        Assert.All(left, session => Assert.DoesNotContain($" srv={mine} ", session, StringComparison.Ordinal));
        Peer other = clients.First(client => left.Any(l => l.Contains($"src={client.Local} ", StringComparison.Ordinal)));
        await other.Ask("of the other server");
    }

    [Fact(Timeout = Slow)]
    public async Task Thousands_of_sessions_are_listed_while_traffic_goes_on()
    {
        const int Count = 3_000;
        ProxyProcess proxy = await Start("--name", "web", "127.0.0.1:0", "echo", "--log-level", "warn");
        await Wait.Many(Count, 32, async _ => await Given.Client(proxy));
        Peer busy = await Given.Client(proxy);
        await busy.Ask("accepted, and all before it");
        for (int i = 0; i < 10; i++)
        {
            Task<string> listing = Say("show sess");
            await busy.Ask("in time");
            Assert.Equal(Count + 1, Lines(await listing).Select(line => line.Split(':')[0]).Distinct().Count());
        }
    }

    // ---- the conversation

    [Fact(Timeout = Quick)]
    public async Task Commands_come_in_lines_with_semicolons_and_in_prompt_mode()
    {
        await Two();
        string version = await Say("show version");
        Assert.Matches(@"^\d+\.\d+\.\d+\n\n$", version);
        Assert.Equal(version, await Say(" show   version \r"));
        Assert.Equal(version + version, await Say("show version;show version;"));
        Assert.Equal(version + "# name\nweb\n\n", await Say("show version\nshow backend"));
        Assert.Equal(version, await Say("show version;quit;show version"));
        Assert.Equal("\n> " + version + "> " + version + "> ", await Say("prompt;show version\nshow version\nquit"));
        Assert.Equal("\n> \n> \n", await Say("prompt\n\nprompt\n"));
        Outcome unfinished = await Tool.Run(Socat, ["-t5", "-", $"UNIX-CONNECT:{Control}"], 30, input: "show version");
        Assert.Equal(version, unfinished.Good());

        // without prompt the answer to one line is the end; with it the client stays
        Peer client = await Given.Client(new UnixDomainSocketEndPoint(Control));
        await client.Send("show version\n");
        Assert.Equal(version, Encoding.UTF8.GetString(await client.ReceiveToEnd()));
        Peer second = await Given.Client(new UnixDomainSocketEndPoint(Control));
        await second.Send("prompt\n");
        await second.ReceiveText("\n> ");
        await second.Send("show ver");
        await second.Send("sion\nquit\n");
        Assert.Equal(version + "> ", Encoding.UTF8.GetString(await second.ReceiveToEnd()));
    }

    [Theory(Timeout = Quick)]
    [InlineData("foo", "Unknown command: 'foo'\n")]
    [InlineData("show", "Unknown command: 'show'\n")]
    [InlineData("shw stat", "Unknown command: 'shw stat'; did you mean 'show stat'?\n")]
    [InlineData("set srver web/a state drain", "Unknown command: 'set srver'; did you mean 'set server'?\n")]
    [InlineData("SHOW INFO", "Unknown command: 'SHOW INFO'")]
    [InlineData("show \"x", "a quote (\") is not closed\n\n")]
    [InlineData("set server", "Require 'backend/server'.\n\n")]
    [InlineData("set server web", "Require 'backend/server'.\n\n")]
    [InlineData("set server web/a", "usage: set server <backend>/<server> state | weight\n\n")]
    [InlineData("set server web/a addr 1.2.3.4", "usage: set server <backend>/<server> state | weight\n\n")]
    [InlineData("set server wbe/a state drain", "No such backend. There is no 'wbe'\n\n")]
    [InlineData("set server webs/a state drain", "No such backend. There is no 'webs'; did you mean 'web'?\n\n")]
    [InlineData("set server web/x state drain", "No such server. There is no 'web/x'; did you mean 'web/a'?\n\n")]
    [InlineData("set server web/a state", "'set server <srv> state' expects 'ready', 'drain' and 'maint'.\n\n")]
    [InlineData("set server web/a state dran", "'set server <srv> state' expects 'ready', 'drain' and 'maint'.\n\n")]
    [InlineData("set server web/a weight", "Require <weight> or <weight%>.\n\n")]
    [InlineData("set server web/a weight 5x", "Require <weight> or <weight%>. '5x' is none\n\n")]
    [InlineData("set server web/a weight 257", "Absolute weight can only be between 0 and 256 inclusive.\n\n")]
    [InlineData("set server web/a weight 25700%", "Absolute weight can only be between 0 and 256 inclusive.\n\n")]
    [InlineData("set weight web/a -1", "Require <weight> or <weight%>. '-1' is none\n\n")]
    [InlineData("get weight", "Require 'backend/server'.\n\n")]
    [InlineData("enable server web/y", "No such server. There is no 'web/y'")]
    [InlineData("disable server", "Require 'backend/server'.\n\n")]
    [InlineData("set maxconn frontend", "A frontend name is expected.\n\n")]
    [InlineData("set maxconn frontend web", "Integer value expected.\n\n")]
    [InlineData("set maxconn frontend web x", "Integer value expected. 'x' is none\n\n")]
    [InlineData("set maxconn frontend wob 4", "No such frontend. There is no 'wob'")]
    [InlineData("set maxconn server web/a", "Require <maxconn>.\n\n")]
    [InlineData("set maxconn global", "Expects an integer value.\n\n")]
    [InlineData("set maxconn global -3", "Expects an integer value. '-3' is none\n\n")]
    [InlineData("show servers state wob", "No such backend. There is no 'wob'")]
    [InlineData("show sess 0x0", "Session not found.\n\n")]
    [InlineData("show sess foo", "Session not found.\n\n")]
    [InlineData("shutdown session", "Session pointer expected (use 'show sess').\n\n")]
    [InlineData("shutdown session 0", "No such session (use 'show sess').\n\n")]
    [InlineData("shutdown sessions server web/q", "No such server.")]
    [InlineData("set severity-output loud", "one of 'none', 'number', 'string' is a required argument\n\n")]
    public async Task Each_mistake_is_answered_with_what_was_wrong(string command, string answer)
    {
        await Two();
        Assert.StartsWith(answer, await Say(command), StringComparison.Ordinal);
        Assert.StartsWith($"\n[3]: {answer}", await Say($"set severity-output number;{command}"), StringComparison.Ordinal);
        Outcome outcome = await Tool.Proxy(["--ctl", Control, .. command.Split(' ')]);
        Assert.Equal(1, outcome.Status);
        Assert.StartsWith(answer.TrimEnd('\n'), outcome.Out, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task The_help_names_each_command_and_those_that_begin_with_a_word()
    {
        await Two();
        string help = await Say("help");
        string unknown = await Say("nonsense");
        Assert.Equal(help, unknown[(unknown.IndexOf('\n', StringComparison.Ordinal) + 1)..]);
        Assert.All(Lines(await Say("help show")), line => Assert.StartsWith("  show ", line, StringComparison.Ordinal));
        Assert.All(Lines(help), line => Assert.InRange(line.Length, 20, 120));
    }

    [Fact(Timeout = Slow)]
    public async Task Clients_that_are_too_many_too_long_or_too_slow_are_cut_off()
    {
        ProxyProcess proxy = await Two();
        EndPoint at = new UnixDomainSocketEndPoint(Control);
        Peer slow = await Given.Client(at);
        await slow.Send($"{string.Concat(Enumerable.Repeat("help;", 1_000))}\n"); // 2 MB, of which nobody reads a byte

        Peer talker = await Given.Client(at);
        await talker.Send(new string('a', 16_384));
        Assert.StartsWith("A line has less than 16384 bytes.", Encoding.UTF8.GetString((await talker.Drain()).Data),
            StringComparison.Ordinal);

        List<Peer> many = [];
        for (int i = 0; i < 15; i++)
        {
            many.Add(await Given.Client(at));
            await many[^1].Send("prompt\n");
            await many[^1].ReceiveText("\n> ");
        }

        await (await Given.Client(at)).ExpectEnd();
        many[0].Dispose();
        await Wait.Until(
            () => Tool.Run(Socat, ["-t20", "-", $"UNIX-CONNECT:{Control}"], 30, input: "show version\n").GetAwaiter().GetResult()
                .Out.Length > 2, // of one that comes too early the socket may be closed before socat has written
            "a place for another client");
        int files = proxy.Descriptors;
        await Wait.Until(() => proxy.Descriptors < files, "the slow client to be cut off", 30);
        many.ForEach(peer => peer.Dispose());
        Peer client = await Given.Client(proxy);
        await client.ReceiveLine();
    }

    [Fact(Timeout = Slow)]
    public async Task Random_commands_never_harm_it()
    {
        ProxyProcess proxy = await Two();
        int seed = Random.Shared.Next();
        TestContext.Current.TestOutputHelper?.WriteLine($"seed {seed}");
        Random random = new(seed);
        string[] words =
        [
            "show", "stat", "info", "sess", "servers", "state", "set", "server", "weight", "maxconn", "frontend", "global", "get",
            "web/a", "web/b", "web", "web/", "/", "/a", "drain", "ready", "maint", "shutdown", "session", "sessions", "0x1", "-1", "0",
            "99999999999", "50%", "%", "help", "prompt", "enable", "disable", "\"", "'", "\\", "", ";", "\n", "\r", "\0", "\u001b[1m",
            "é", "severity-output", "number", "reload", new string('x', 3_000), "up", "no-maint", "4", "backend", "version",
        ];
        for (int i = 0; i < 400; i++)
        {
            StringBuilder line = new();
            for (int count = random.Next(1, 9); count > 0; count--)
            {
                line.Append(words[random.Next(words.Length)]).Append(random.Next(8) == 0 ? "" : " ");
            }

            byte[] bytes = Encoding.UTF8.GetBytes($"{line}\n");
            for (int flips = random.Next(4) == 0 ? 3 : 0; flips > 0; flips--)
            {
                bytes[random.Next(bytes.Length)] = (byte)random.Next(256);
            }

            using Peer client = await Peer.Connect(new UnixDomainSocketEndPoint(Control));
            await client.Send(bytes);
            client.Finish();
            await client.Drain();
        }

        Assert.StartsWith("Name: ", await Say("show info"), StringComparison.Ordinal);
        await Say("enable server web/a;set server web/a weight 1;set maxconn frontend web 0;set maxconn global 0;set maxconn server web/a 0");
        await (await Given.Client(proxy)).ReceiveLine();
    }

    // ---- --ctl

    [Fact(Timeout = Quick)]
    public async Task Ctl_sends_a_command_to_us_and_to_HAProxy()
    {
        await Two();
        Assert.Equal("1 (initial 1)\n", (await Tool.Proxy("--ctl", Control, "get", "weight", "web/a")).Good());
        Assert.Equal("1 (initial 1)\n", (await Tool.Proxy($"--ctl=unix:{Control}", "get weight web/a")).Good());
        Assert.Equal(string.Empty, (await Tool.Proxy("--ctl", Control, "set", "server", "web/a", "state", "drain")).Good());
        Assert.Equal("\n1 (initial 1)\n", (await Tool.Proxy("--ctl", Control, "set weight web/a 100%;get weight web/a")).Good());
        Assert.Equal(3, Rows((await Tool.Proxy("--ctl", Control, "show", "stat", "-1", "-1", "-1")).Good()).Count(r => r["sid"] != "1"));
        Outcome second = await Tool.Proxy("--ctl", Control, "show version;get weight web/no;show version");
        Assert.Equal(1, second.Status);
        Assert.Equal(6, second.Out.Split('\n').Length);

        string haproxy = await HAProxy();
        Assert.Contains("Name: HAProxy\n", (await Tool.Proxy("--ctl", haproxy, "show", "info")).Good(), StringComparison.Ordinal);
        Assert.Equal(string.Empty, (await Tool.Proxy("--ctl", haproxy, "set server b/s state drain")).Good());
        Assert.Equal(["DRAIN"], Rows((await Tool.Proxy("--ctl", haproxy, "show stat b 4 -1")).Good()).Select(r => r["status"]));
        Outcome missing = await Tool.Proxy("--ctl", haproxy, "set server b/x state drain");
        Assert.Equal((1, "No such server.\n"), (missing.Status, missing.Out));
        Assert.Equal(1, (await Tool.Proxy("--ctl", haproxy, "nonsense")).Status);
        Assert.Equal(1, (await Tool.Proxy("--ctl", haproxy, "show sess 0x1")).Status);
    }

    [Fact(Timeout = Quick)]
    public async Task Ctl_fails_where_nobody_answers()
    {
        string file = Given.Write("file", "");
        Outcome none = await Tool.Proxy("--ctl", Given.Path("none"), "help");
        Assert.Equal((1, $"tcpproxy: error: --ctl: {Given.Path("none")}: no such file or directory"), (none.Status, none.ErrLines[0]));
        Outcome notOne = await Tool.Proxy("--ctl", file, "help");
        Assert.Equal((1, $"tcpproxy: error: --ctl: {file}: connection refused"), (notOne.Status, notOne.ErrLines[0]));
        Upstream mute = Given.Server(new UnixDomainSocketEndPoint(Control));
        Outcome late = await Tool.Proxy("--timeout", "300ms", "--ctl", $"unix:{Control}", "help");
        Assert.Equal((1, $"tcpproxy: error: --ctl: {Control}: no answer in time"), (late.Status, late.ErrLines[0]));
        Assert.Equal(1, mute.Accepted);
    }

    [Fact(Timeout = Quick)]
    public async Task It_is_there_as_long_as_connections_are_drained()
    {
        ProxyProcess proxy = await Two("--drain-timeout", "1m");
        Peer client = await Given.Client(proxy);
        await client.ReceiveLine();
        proxy.Signal(ProxyProcess.SigTerm);
        await proxy.Line("draining");
        Assert.Contains("Stopping: 1\n", await Say("show info"), StringComparison.Ordinal);
        string id = (await Say("show sess")).Split(':')[0];
        await Say($"shutdown session {id}");
        Assert.Equal(0, await proxy.Exit());
        Assert.False(File.Exists(Control));
    }

    // ---- helpers

    private static string Socat => Tool.Need("socat", "socat");

    private Task<ProxyProcess> Start(params string[] arguments)
    {
        if (File.Exists(Control))
        {
            File.Delete(Control); // of the proxy before
        }

        return Given.Proxy(["--control", $"unix:{Control}", .. arguments]);
    }

    /// <summary>Two servers, a and b, that say their name.</summary>
    private Task<ProxyProcess> Two(params string[] arguments) => Start(
        ["--name", "web", "-l", "127.0.0.1:0", "-u", Given.Named("a").Address, "name=a", "slow-start=off", "-u",
            Given.Named("b").Address, "name=b", "slow-start=off", .. arguments]);

    private async Task<string> Say(string lines, string? path = null) =>
        (await Tool.Run(Socat, ["-t20", "-", $"UNIX-CONNECT:{path ?? Control}"], 30, input: $"{lines}\n")).Good();

    private async Task<string[]> Served(ProxyProcess proxy, int count)
    {
        string[] names = new string[count];
        for (int i = 0; i < count; i++)
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            names[i] = await client.ReceiveLine();
            client.Finish();
            await client.ExpectEnd();
        }

        return names;
    }

    /// <summary>The path of the stats socket of a real one.</summary>
    private async Task<string> HAProxy()
    {
        string haproxy = Tool.Need("haproxy", "haproxy");
        string version = (await Tool.Run(haproxy, "-v")).Good();
        Assert.SkipUnless(version.Contains("version 2.6", StringComparison.Ordinal), "its columns are those of HAProxy 2.6");
        string path = Given.Path("haproxy.sock");
        string file = Given.Write("haproxy.cfg",
            $$"""
            global
              stats socket {{path}} level admin
            defaults
              mode tcp
              timeout connect 1s
              timeout client 1m
              timeout server 1m
            frontend f
              bind 127.0.0.1:{{Given.FreePorts(1)}}
              default_backend b
            backend b
              server s 127.0.0.1:9

            """);
        Tool.Background(Given, haproxy, "-db", "-f", file);
        await Wait.Until(() => File.Exists(path), "HAProxy's socket");
        return path;
    }

    private static string[] Lines(string text) => text.Split('\n', StringSplitOptions.RemoveEmptyEntries);

    private static string Of(Dictionary<string, string> row, string columns) =>
        string.Join(' ', columns.Split(' ').Select(column => row[column].Replace(' ', '_')));

    private static (string State, string Reason, string Level) Of(LogLine line) => (line["state"], line["reason"], line.Level);

    /// <summary>RFC 4180; the header begins with "# ".</summary>
    private static List<Dictionary<string, string>> Rows(string text)
    {
        List<string[]> records = [.. Lines(text).Select(Cells)];
        records[0][0] = records[0][0][2..];
        Assert.All(records, cells => Assert.Equal(records[0].Length, cells.Length));
        return [.. records.Skip(1).Select(cells =>
            records[0].Zip(cells).SkipLast(1).ToDictionary(cell => cell.First, cell => cell.Second))];
    }

    private static string[] Cells(string line)
    {
        List<string> cells = [];
        StringBuilder cell = new();
        bool isQuoted = false;
        for (int i = 0; i <= line.Length; i++)
        {
            if (i == line.Length || (line[i] == ',' && !isQuoted))
            {
                cells.Add(cell.ToString());
                cell.Clear();
            }
            else if (line[i] == '"' && isQuoted && i + 1 < line.Length && line[i + 1] == '"')
            {
                cell.Append(line[i++]);
            }
            else if (line[i] == '"')
            {
                isQuoted ^= true;
            }
            else
            {
                cell.Append(line[i]);
            }
        }

        return [.. cells];
    }
}
