using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>HUP: the file is read again, and the difference applied in the same process.</summary>
public sealed class ReloadTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task A_listener_that_stays_keeps_its_socket_and_its_clients_and_new_ones_get_the_new_route()
    {
        Upstream first = Given.Named("first");
        Upstream second = Given.Named("second");
        string file = Given.Write("conf", $"listen 127.0.0.1:0\nname web\nupstream {first.Address}\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        string address = proxy.Addresses[0];
        string socket = SocketOf(proxy);
        Peer old = await Given.Client(proxy);
        Assert.Equal("first", await old.ReceiveLine());

        await Reload(proxy, $"idle-timeout 2h\nlisten 127.0.0.1:0\nname web\nupstream {second.Address}\nmax-bytes-up 3\n",
            $"~ route web: max-bytes-up off -> 3, idle-timeout 1h -> 2h, upstream {first.Address} -> {second.Address}");
        await proxy.Ready();
        Assert.Equal([address], proxy.Addresses);
        Assert.Equal(socket, SocketOf(proxy));
        Peer young = await Given.Client(proxy);
        Assert.Equal("second", await young.ReceiveLine());
        await old.Ask("more than three bytes");
        await young.Send("hello");
        Assert.Equal("hel", Encoding.ASCII.GetString(await young.ReceiveToEnd()));
        old.Finish();
        await old.ExpectEnd();
        Assert.Equal(first.Address, (await proxy.Connection(old))["upstream"]);
        Assert.Equal(second.Address, (await proxy.Connection(young))["upstream"]);
    }

    [Fact(Timeout = Quick)]
    public async Task Listeners_come_and_go_and_connections_of_those_that_go_live_on()
    {
        string path = Given.Path("socket");
        int[] ports = Free(3);
        string file = Given.Write("conf", $"listen {ports[0]}\nupstream echo\nlisten unix:{path}\nupstream echo\nlisten 127.0.0.1:0\nupstream echo\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        EndPoint kept = proxy.Endpoint(2);
        Peer client = await Given.Client(proxy, 0);
        await client.Ask("hello");
        await Reload(proxy, $"listen 127.0.0.1:0\nupstream echo\nlisten 127.0.0.1:{ports[1]}-{ports[2]}\nupstream echo\n",
            $"- listen {ports[0]} ({file}:1)", $"- listen unix:{path} ({file}:3)", $"+ listen 127.0.0.1:{ports[1]}-{ports[2]} ({file}:3)");
        await proxy.Ready();
        Assert.Equal([$"{kept}", $"127.0.0.1:{ports[1]}", $"127.0.0.1:{ports[2]}"], proxy.Addresses);
        Assert.Equal($"127.0.0.1:{ports[1]}-{ports[2]}", (await proxy.LinesOf("listening", 4))[3]["listen"]);
        await client.Ask("still here");
        await Wait.Until(() => Refuses(ports[0]), "the old port to be free");
        Assert.False(File.Exists(path));
        for (int i = 0; i < 3; i++)
        {
            await (await Given.Client(proxy, i)).Ask("hello");
        }

        // the range grows at both ends: what it had before stays, whatever its place in it
        await Reload(proxy, $"listen {ports[0]}-{ports[0]}\nupstream echo\nlisten 127.0.0.1:{ports[1]}\nupstream echo\nlisten 127.0.0.1:{ports[2]}\nupstream echo\n");
        await proxy.Ready();
        Assert.Equal([$"127.0.0.1:{ports[0]}", $"127.0.0.1:{ports[1]}", $"127.0.0.1:{ports[2]}"], proxy.Addresses);
        await (await Given.Client(proxy, 2)).Ask("hello");
        await client.Ask("still here");
    }

    [Fact(Timeout = Quick)]
    public async Task What_is_wrong_changes_nothing_and_is_said_with_its_place()
    {
        Upstream taken = Given.Server();
        const string Good = "listen 127.0.0.1:0\nname web\nupstream echo\n";
        string file = Given.Write("conf", Good);
        ProxyProcess proxy = (await Given.Proxy("-c", file)).Tolerate("reload");
        EndPoint web = proxy.Endpoint();
        await Reload(proxy, "# a comment\nlisten 127.0.0.1:0\nupstream echo\nidle-timeout banana\n", $"{file}:4: idle-timeout: 'banana'*; nothing has changed");
        await Reload(proxy, "upstream echo\n", $"{file}: no route*; nothing has changed");
        await Reload(proxy, $"listen 127.0.0.1:0\nname other\nupstream discard\nlisten {taken.Address}\nupstream echo\n",
            $"{file}:4: listen: route {taken.Address}: cannot listen on {taken.Address}: address already in use; nothing has changed");
        await Reload(proxy, Good + $"record {Given.Path("none")}\n", $"{file}:1: listen: --record: cannot write to {Given.Path("none")}*; nothing has changed");
        await Reload(proxy, Good + $"deny @{Given.Path("none")}\n", $"{file}:4: deny: cannot read*; nothing has changed");
        File.Delete(file);
        await Reload(proxy, null, $"--config: cannot read {file}: no such file*; nothing has changed");
        Assert.All(proxy.Lines.Where(l => l.Event == "reload"), l => Assert.Equal("error", l.Level));
        await (await Given.Client(web)).Ask("hello");
        await Reload(proxy, Good, "nothing is different");
        await proxy.Ready();
        Assert.Equal([$"{web}"], proxy.Addresses);
        await Wait.Until(() => Sockets(proxy) == 1, "the sockets of what was not applied to be closed");
    }

    [Fact(Timeout = Quick)]
    public async Task What_cannot_change_is_said_and_the_rest_applies()
    {
        string file = Given.Write("conf", "listen 127.0.0.1:0\nupstream echo\n");
        ProxyProcess proxy = (await Given.Proxy("-c", file, "--max-connections", "5")).Tolerate("reload");
        const string Rest = "threads 3\nlog json\nlog-level debug\nlisten 127.0.0.1:0\nupstream echo\n";
        const string Ignored = "! only a restart changes this: log text -> json, threads auto -> 3";
        await Reload(proxy, $"drain-timeout 0\n{Rest}", "~ log-level info -> debug", "~ drain-timeout 30s -> 0", Ignored);
        await Reload(proxy, $"drain-timeout 1s\n{Rest}", "~ drain-timeout 0 -> 1s", Ignored);
        await (await Given.Client(proxy)).Ask("hello");
        await proxy.Line("accepted");
    }

    [Fact(Timeout = Quick)]
    public async Task Without_a_file_HUP_ends_nobody()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        await Reload(proxy, null, "there is no --config file to be read again");
        await client.Ask("hello");
        await (await Given.Client(proxy)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task Under_nohup_HUP_reloads_all_the_same()
    {
        Tool.NeedLibc("the runtime leaves HUP ignored");
        ProxyProcess proxy = await Given.Proxy(
            new Launch { Before = ["nohup"], Chatter = ["nohup: "] }, "-c", Given.Write("conf", "listen 127.0.0.1:0\nupstream echo\n"));
        await Reload(proxy, "listen 127.0.0.1:0\nupstream echo\nidle-timeout 5s\n", "~ route 127.0.0.1:0: idle-timeout 1h -> 5s");
    }

    [Fact(Timeout = Quick)]
    public async Task Connections_count_until_they_end_whatever_their_route_has_become()
    {
        string file = Given.Write("conf", "max-connections 10\nlisten 127.0.0.1:0\nname web\nupstream echo\nmax-connections 3\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        Peer[] clients = [await Given.Client(proxy), await Given.Client(proxy), await Given.Client(proxy)];
        await Task.WhenAll(clients.Select(one => one.Ask("hello")));

        await Reload(proxy, "max-connections 10\nlisten 127.0.0.1:0\nname web\nupstream echo\nmax-connections 4\nmax-connections-per-ip 9\n");
        await (await Given.Client(proxy)).Ask("the fourth");
        await (await Given.Client(proxy)).ExpectEnd();

        // one waits, until there is room: first the old line is as long as the new file says, then the bound is
        await Reload(proxy, "max-connections 10\nlisten 127.0.0.1:0\nname web\nupstream echo\nmax-connections 4\nqueue 2\nqueue-timeout 30s\n");
        Peer waiting = await Given.Client(proxy);
        await waiting.Send("I wait");
        await Reload(proxy, "max-connections 10\nlisten 127.0.0.1:0\nname www\nupstream echo\nmax-connections 5\n",
            "~ route web: max-connections 4 -> 5, queue 2 -> 0, queue-timeout 30s -> 5s, name web -> www");
        await waiting.ReceiveText("I wait");
        await (await Given.Client(proxy)).ExpectEnd();
        clients[0].Finish();
        await clients[0].ExpectEnd();
        await proxy.Connection(clients[0]);
        await (await Given.Client(proxy)).Ask("in its place");

        // the process has 5
        await Reload(proxy, "max-connections 6\nlisten 127.0.0.1:0\nname www\nupstream echo\nmax-connections off\n");
        await (await Given.Client(proxy)).Ask("the sixth");
        await (await Given.Client(proxy)).ExpectEnd();
    }

    [Fact(Timeout = Quick)]
    public async Task Addresses_and_rates_stay_counted()
    {
        string file = Given.Write("conf", "listen 127.0.0.1:0\nupstream echo\nmax-connections-per-ip 2\nconnect-rate 2/m 3\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        await (await Given.Client(proxy)).Ask("one");
        await (await Given.Client(proxy)).Ask("two");
        await Reload(proxy, "listen 127.0.0.1:0\nupstream echo\nmax-connections-per-ip 2\nconnect-rate 2/m 3\nretries 1\n");
        Peer third = await Given.Client(proxy);
        await third.ExpectEnd();
        Assert.Equal("connection limit of the address", (await proxy.Connection(third)).Reason);
        Peer fourth = await Given.Client(proxy);
        await fourth.ExpectEnd();
        Assert.Equal("connect rate", (await proxy.Connection(fourth)).Reason);
        await Reload(proxy, "listen 127.0.0.1:0\nupstream echo\nmax-connections-per-ip 3\n");
        await (await Given.Client(proxy)).Ask("three");
        await (await Given.Client(proxy)).ExpectEnd();
    }

    [Theory(Timeout = Quick)]
    [InlineData("connect-rate")]
    [InlineData("connect-rate-per-ip")]
    public async Task A_connect_rate_that_is_raised_lets_clients_in_at_once(string option)
    {
        const string Route = "listen 127.0.0.1:0\nupstream echo\n";
        ProxyProcess proxy = await Given.Proxy("-c", Given.Write("conf", $"{Route}{option} 10/m\n"));
        for (int i = 0; i < 10; i++)
        {
            await (await Given.Client(proxy)).Ask("hello");
        }

        await (await Given.Client(proxy)).ExpectEnd();
        await Reload(proxy, $"{Route}{option} 100/s\n");
        await (await Given.Client(proxy)).Drain(10); // finds it out, and may be refused
        await Wait.Pause(50);
        await (await Given.Client(proxy)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task Servers_that_stay_keep_their_state_and_their_connections()
    {
        Upstream first = Given.Named("first");
        Upstream second = Given.Named("second");
        Upstream third = Given.Named("third");
        int dead = Given.RefusingPort();
        string file = Given.Write("conf", Text("1 max-connections=2"));
        ProxyProcess proxy = (await Given.Proxy("-c", file)).Tolerate("server");
        for (int i = 0; i < 2; i++)
        {
            Assert.Equal("first", await (await Given.Client(proxy)).ReceiveLine());
        }

        await proxy.Line("server", l => l["state"] == "down");
        await Reload(proxy, Text("1 max-connections=3") + $"upstream {second.Address} backup\n",
            $"~ route web: upstream {first.Address} weight=1 max-connections=2 -> {first.Address} weight=1 max-connections=3, upstream {second.Address} backup added");
        Assert.Equal("first", await (await Given.Client(proxy)).ReceiveLine()); // the third of its three
        Assert.Equal("second", await (await Given.Client(proxy)).ReceiveLine());
        await Reload(proxy, $"listen 127.0.0.1:0\nname web\nbalance first\nupstream {third.Address}\n");
        Assert.Equal("third", await (await Given.Client(proxy)).ReceiveLine());
        await Reload(proxy, Text("1 max-connections=3"));
        Peer refused = await Given.Client(proxy);
        await refused.ExpectReset(); // the first still has its three, and the other came back as a new server
        await proxy.LinesOf("server", 2, l => l["state"] == "down");

        string Text(string weight) => $"fail-timeout 1h\nmax-fails 1\nretries 5\nlisten 127.0.0.1:0\nname web\nbalance first\n"
            + $"upstream 127.0.0.1:{dead}\nupstream {first.Address} weight={weight}\n";
    }

    [Fact(Timeout = Quick)]
    public async Task Checks_go_on_for_what_stays_begin_for_what_comes_and_end_for_what_goes()
    {
        int checkedFirst = 0, checkedSecond = 0;
        Upstream first = Given.Server(peer => { Interlocked.Increment(ref checkedFirst); peer.Dispose(); return Task.CompletedTask; });
        Upstream second = Given.Server( // an address of its own, so that no client takes its port while it is given up
            peer => { Interlocked.Increment(ref checkedSecond); peer.Dispose(); return Task.CompletedTask; }, new IPEndPoint(IPAddress.Parse("127.0.0.2"), 0));
        string file = Given.Write("conf", $"listen 127.0.0.1:0\nupstream {first.Address}\ncheck 100ms\ncheck-fall 1\n");
        ProxyProcess proxy = (await Given.Proxy("-c", file)).Tolerate("server");
        await Wait.Until(() => checkedFirst > 2, "checks");
        await Reload(proxy, $"listen 127.0.0.1:0\nupstream {first.Address}\nupstream {second.Address}\ncheck 100ms\ncheck-fall 1\n");
        int before = checkedFirst;
        await Wait.Until(() => checkedFirst > before + 2 && checkedSecond > 2, "checks of both");
        await Reload(proxy, $"listen 127.0.0.1:0\nupstream {second.Address}\ncheck 100ms\ncheck-fall 1\n");
        await Wait.Pause(200);
        before = checkedFirst;
        int other = checkedSecond;
        await Wait.Until(() => checkedSecond > other + 5, "checks of the one that stays");
        Assert.Equal(before, checkedFirst);

        // what checks have found down, is not down for ever where there are none any more
        second.Refuse();
        Upstream third = Given.Named("third");
        await Reload(proxy, $"listen 127.0.0.1:0\nupstream {second.Address}\nupstream {third.Address}\ncheck 100ms\ncheck-fall 1\n");
        await proxy.Line("server", l => l["state"] == "down" && l["server"] == second.Address);
        await Reload(proxy, $"listen 127.0.0.1:0\nbalance first\nupstream {second.Address}\n");
        Given.Named("second", second.Endpoint);
        Assert.Equal("second", await (await Given.Client(proxy)).ReceiveLine());
    }

    [Fact(Timeout = Quick)]
    public async Task Files_of_taps_stay_open_as_long_as_anybody_needs_them()
    {
        string kept = Given.Path("kept.pcapng");
        string gone = Given.Path("gone.pcapng");
        string folder = Directory.CreateDirectory(Given.Path("records")).FullName;
        string route = $"listen 127.0.0.1:0\nupstream echo\npcap {kept}\n";
        string file = Given.Write("conf", route + $"pcap {gone}\nrecord {folder}\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        Peer client = await Given.Client(proxy);
        await client.Ask("before");
        string open = DescriptorOf(proxy, kept)!;
        await Reload(proxy, route, $"~ route {"127.0.0.1:0"}: pcap {gone} removed, record {folder} removed");
        Peer other = await Given.Client(proxy);
        await other.Ask("not recorded");
        other.Dispose();
        await Wait.Pause(1_200); // the old route is given up a second later
        await client.Ask("after");
        Assert.NotNull(DescriptorOf(proxy, gone));
        client.Finish();
        await client.ExpectEnd();
        await Wait.Until(() => DescriptorOf(proxy, gone) is null, "the old capture to be closed");
        Assert.Equal(open, DescriptorOf(proxy, kept));
        string recorded = Assert.Single(Directory.GetFiles(folder, "ds_*"));
        await Wait.Until(() => File.ReadAllText(recorded) == "beforeafter", "all of it to be recorded");
        Assert.Contains("after", Encoding.Latin1.GetString(File.ReadAllBytes(gone)), StringComparison.Ordinal);
        await Reload(proxy, route + $"record {folder}\n");
        Peer third = await Given.Client(proxy);
        await third.Ask("recorded again");
        third.Dispose();
        await Wait.Until(() => Directory.GetFiles(folder, "ds_*").Length == 2, "a second recording");
        await proxy.Stop();
        string all = Encoding.Latin1.GetString(File.ReadAllBytes(kept));
        Assert.All(new[] { "before", "not recorded", "after", "recorded again" }, one => Assert.Contains(one, all, StringComparison.Ordinal));
    }

    [Fact(Timeout = Quick)]
    public async Task A_socket_of_systemd_stays_as_well_and_cannot_be_had_a_second_time()
    {
        string activate = Tool.Need("systemd-socket-activate", "systemd");
        int[] ports = Free(2);
        Launch launch = new()
        {
            Before = [activate, "--fdname=web", "-l", $"127.0.0.1:{ports[0]}"],
            Chatter = ["Listening on ", "Communication attempt", "Execing "],
            AwaitReady = false,
        };
        Upstream upstream = Given.Named("first");
        string file = Given.Write("conf", "listen fd:web\nupstream echo\n");
        ProxyProcess proxy = (await Given.Proxy(launch, "-c", file)).Tolerate("reload");
        await Wait.Until(() => !Refuses(ports[0]), "systemd-socket-activate to listen");
        await proxy.Ready();
        Peer old = await Given.Client(proxy);
        await old.Ask("hello");
        await Reload(proxy, $"listen fd:web\nupstream {upstream.Address}\n", $"~ route fd:web: upstream echo -> {upstream.Address}");
        Assert.Equal("first", await (await Given.Client(proxy)).ReceiveLine());
        await Reload(proxy, $"listen {ports[1]}\nupstream echo\n", $"- listen fd:web ({file}:1)", $"+ listen {ports[1]} ({file}:1)");
        await Reload(proxy, "listen fd:web\nupstream echo\n", $"{file}:1: listen: route fd:web: cannot listen on fd:web: descriptor 3 was taken before*");
        await old.Ask("still here");
    }

    [Fact(Timeout = Quick)]
    public async Task A_dry_run_asks_the_running_process_and_changes_nothing()
    {
        string control = Given.Path("control");
        string file = Given.Write("conf", $"control unix:{control}\nlisten 127.0.0.1:0\nname web\nupstream echo\n");
        Outcome outcome = await Tool.Proxy("-c", file, "--reload-dry-run");
        Assert.Equal((1, $"tcpproxy: error: --reload-dry-run: no running process answers: {control}: no such file or directory\n"), (outcome.Status, outcome.Err));
        ProxyProcess proxy = (await Given.Proxy("-c", file)).Tolerate("reload");
        Assert.Equal("nothing is different\n", (await Tool.Proxy("-c", file, "--reload-dry-run")).Good());
        Given.Write("conf", $"control unix:{control}\nthreads 7\nlisten 127.0.0.1:0\nname web\nupstream discard\nlisten 127.0.0.1:0\nname two\nupstream echo\n");
        string expected = $"~ route web: upstream echo -> discard\n+ listen 127.0.0.1:0, route two ({file}:6)\n! only a restart changes this: threads auto -> 7\n";
        Assert.Equal(expected, (await Tool.Proxy("-c", file, "--reload-dry-run")).Good());
        await (await Given.Client(proxy)).Ask("still echo");
        Assert.DoesNotContain(proxy.Lines, l => l.Event == "reload");
        Assert.Equal(expected, (await Tool.Proxy("--ctl", control, "reload")).Good());
        await proxy.Ready();
        Assert.Equal(2, proxy.Addresses.Count);

        Given.Write("conf", $"control unix:{control}\nlisten 127.0.0.1:0\nupstream banana\n");
        outcome = await Tool.Proxy("-c", file, "--reload-dry-run");
        Assert.Equal(2, outcome.Status);
        Assert.StartsWith($"tcpproxy: error: {file}:3: upstream: 'banana'", outcome.Err, StringComparison.Ordinal);
        outcome = await Tool.Proxy("--ctl", control, "reload");
        Assert.Equal(1, outcome.Status);
        Assert.StartsWith($"{file}:3: upstream: 'banana'", outcome.Out, StringComparison.Ordinal);
        outcome = await Tool.Proxy("127.0.0.1:0", "echo", "--reload-dry-run");
        Assert.Equal(1, outcome.Status);
        Assert.Contains("--control", Assert.Single(outcome.ErrLines), StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task Counters_and_what_an_administrator_said_survive()
    {
        Upstream a = Given.Named("a");
        Upstream b = Given.Named("b");
        string control = Given.Path("control");
        string head = $"control unix:{control}\nlisten 127.0.0.1:0\nname web\nbalance first\nupstream {a.Address} name=a weight=2\n";
        string file = Given.Write("conf", head + $"upstream {b.Address} name=b\n");
        ProxyProcess proxy = (await Given.Proxy("-c", file)).Tolerate("server");
        Peer open = await Given.Client(proxy);
        Assert.Equal("a", await open.ReceiveLine());
        await Tell("set server web/a state drain");
        await Tell("set server web/b weight 7");
        await Reload(proxy, "retries 1\n" + head + $"upstream {b.Address} name=b\nupstream discard\n");
        Assert.Equal("b", await (await Given.Client(proxy)).ReceiveLine());
        Assert.Equal("7 (initial 1)\n", await Tell("get weight web/b"));
        string[] columns = (await Tell("show stat")).Split('\n');
        List<string> names = [.. columns[0][2..].Split(',')];
        string[][] rows = [.. columns.Skip(1).Where(l => l.Length > 0).Select(l => l.Split(','))];
        Assert.Equal(["2", "2"], new[] { "stot", "scur" }.Select(name => rows.First(row => row[1] == "FRONTEND")[names.IndexOf(name)]));
        Assert.Equal(["1", "1"], new[] { "stot", "scur" }.Select(name => rows.First(row => row[1] == "a")[names.IndexOf(name)]));
        await Reload(proxy, "retries 1\n" + head + $"upstream {b.Address} name=b weight=3\n");
        Assert.Equal("3 (initial 3)\n", await Tell("get weight web/b"));

        async Task<string> Tell(string command) => (await Tool.Proxy("--ctl", control, command)).Good();
    }

    [Fact(Timeout = Quick)]
    public async Task A_stream_that_waits_for_its_rate_goes_on_when_that_is_lowered()
    {
        const int Mega = 1 << 20;
        long received = 0;
        Upstream upstream = Given.Server(async peer =>
        {
            byte[] buffer = new byte[Mega];
            for (int count; (count = await peer.ReceiveSome(buffer)) > 0;)
            {
                Interlocked.Add(ref received, count);
            }
        });
        string route = $"listen 127.0.0.1:0\nname web\nupstream {upstream.Address}\n";
        string file = Given.Write("conf", $"{route}rate-total-up 10m/s\n");
        ProxyProcess proxy = await Given.Proxy("-c", file);
        Peer client = await Given.Client(proxy);
        _ = client.Push();
        await Wait.Until(() => Interlocked.Read(ref received) > 3 * Mega, "a stream at the first rate");
        await Reload(proxy, $"{route}rate-total-up 1m/s\n", "~ route web: rate-total-up 10m/s -> 1m/s");
        long before = Interlocked.Read(ref received);
        await Wait.Until(() => Interlocked.Read(ref received) > before + (2 * Mega), "a stream at the second rate", 10);
    }

    // ---- helpers

    /// <summary>Writes the file, says HUP, and waits for what is said of it; a * stands for anything.</summary>
    private async Task Reload(ProxyProcess proxy, string? text, params string[] expected)
    {
        int before = proxy.Lines.Count(l => l.Event == "reload");
        if (text is not null)
        {
            Given.Write("conf", text);
        }

        proxy.Signal(ProxyProcess.SigHup);
        List<LogLine> lines = await proxy.LinesOf("reload", before + Math.Max(1, expected.Length));
        Assert.Equal(expected.Length == 0 ? lines.Count : before + expected.Length, lines.Count);
        for (int i = 0; i < expected.Length; i++)
        {
            string said = lines[before + i]["message"];
            string[] parts = expected[i].Split('*');
            Assert.StartsWith(parts[0], said, StringComparison.Ordinal);
            Assert.EndsWith(parts[^1], said, StringComparison.Ordinal);
            Assert.True(parts.Length > 1 || said == parts[0], $"{said} is not {parts[0]}");
        }
    }

    private static int[] Free(int count) => [.. Enumerable.Range(Given.FreePorts(count), count)];

    private static bool Refuses(int port)
    {
        using Socket probe = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            probe.Connect(IPAddress.Loopback, port);
            return false;
        }
        catch (SocketException e)
        {
            return e.SocketErrorCode == SocketError.ConnectionRefused;
        }
    }

    /// <summary>The inode of its one listening socket, which is the socket's identity.</summary>
    private static string SocketOf(ProxyProcess proxy) => Assert.Single(Listening(proxy));

    private static int Sockets(ProxyProcess proxy) => Listening(proxy).Count;

    private static List<string> Listening(ProxyProcess proxy)
    {
        HashSet<string> own = [.. Directory.GetFiles($"/proc/{proxy.Id}/fd").Select(LinkOf).OfType<string>()];
        return [.. File.ReadLines($"/proc/{proxy.Id}/net/tcp").Skip(1).Select(line => line.Split(' ', StringSplitOptions.RemoveEmptyEntries))
            .Where(words => words[3] == "0A" && own.Contains($"socket:[{words[9]}]")).Select(words => words[9])];
    }

    private static string? DescriptorOf(ProxyProcess proxy, string path) =>
        Directory.GetFiles($"/proc/{proxy.Id}/fd").FirstOrDefault(one => LinkOf(one) == path);

    private static string? LinkOf(string descriptor)
    {
        try
        {
            return new FileInfo(descriptor).LinkTarget;
        }
        catch (IOException)
        {
            return null; // closed meanwhile
        }
    }
}
