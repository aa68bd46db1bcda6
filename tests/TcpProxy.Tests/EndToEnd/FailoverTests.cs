using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>Servers that fail, come back and move, without a client that notices.</summary>
public sealed class FailoverTests : EndToEndTest
{
    [Theory(Timeout = Quick)]
    [InlineData("leastconn")]
    [InlineData("roundrobin")]
    [InlineData("random")]
    [InlineData("source")]
    [InlineData("first")]
    public async Task Beside_servers_that_refuse_are_silent_or_cannot_be_reached_one_is_enough(string policy)
    {
        Upstream silent = await Given.Silent();
        Upstream good = Given.Named("good");
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", $"127.0.0.1:{Given.RefusingPort()}", silent.Address, "127.255.255.255:9",
            good.Address, "--balance", policy, "--connect-timeout", "300ms", "--fail-timeout", "1m");
        proxy.Tolerate("server");
        await Wait.Many(60, 10, async i =>
        {
            IPEndPoint from = new(IPAddress.Parse($"127.3.0.{i + 1}"), 0);
            Peer client = await Given.Client(proxy.Endpoint(), from);
            Assert.Equal("good", await client.ReceiveLine());
            await client.Ask("hello");
        });

        // each is said to be down once, why, and from then on costs nobody any time
        if (policy != "first")
        {
            List<LogLine> down = await proxy.LinesOf("server", 3);
            Assert.Equal(3, down.Select(line => line["server"]).Distinct().Count());
            Assert.All(down, line => Assert.Equal(("down", "warn", "127.0.0.1:0"), (line["state"], line.Level, line["route"])));
            Assert.Contains(down, line => line.Reason == "connection refused");
            Assert.Contains(down, line => line.Reason == "connect timeout" && line["server"] == silent.Address);
            Peer late = await Given.Client(proxy);
            await late.ReceiveLine();
            late.Finish();
            await late.ExpectEnd();
            Assert.True((await proxy.Connection(late)).Number("connect_ms") < 200);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_server_that_is_down_is_tried_again_and_said_to_be_up()
    {
        int port = Given.RefusingPort(IPAddress.Parse("127.0.0.2"));
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", $"127.0.0.2:{port}", "slow-start=off", Given.Named("b").Address, "--balance",
            "roundrobin", "--max-fails", "2", "--fail-timeout", "3s");
        proxy.Tolerate("server");
        await Served(proxy, 6);
        Assert.Equal("down", (await proxy.Line("server"))["state"]);
        Given.Named("a", new IPEndPoint(IPAddress.Parse("127.0.0.3"), 0)); // another address: no matter
        Upstream back = Given.Named("a", new IPEndPoint(IPAddress.Parse("127.0.0.2"), port));
        Assert.DoesNotContain("a", await Served(proxy, 2));
        await Wait.Pause(3_100);
        Assert.Contains("a", await Served(proxy, 2));
        List<LogLine> lines = await proxy.LinesOf("server", 2);
        Assert.Equal(["down", "up"], lines.Select(line => line["state"]));
        Assert.All(lines, line => Assert.Equal(back.Address, line["server"]));
        Assert.Equal(["a", "b"], (await Served(proxy, 2)).Order());
    }

    [Fact(Timeout = Quick)]
    public async Task A_lone_server_is_never_taken_for_down_and_when_all_are_down_all_are_tried()
    {
        int port = Given.RefusingPort(IPAddress.Parse("127.0.0.2"));
        int other = Given.RefusingPort(IPAddress.Parse("127.0.0.3"));
        ProxyProcess proxy = await Given.Proxy(
            "--max-fails", "1", "-l", "127.0.0.1:0", "-u", $"127.0.0.2:{port}", "--name", "lone",
            "-l", "127.0.0.1:0", "-u", $"127.0.0.2:{port}", "-u", $"127.0.0.3:{other}", "--name", "pair");
        proxy.Tolerate("server");
        for (int i = 0; i < 5; i++)
        {
            await (await Given.Client(proxy, 0)).ExpectReset();
            await (await Given.Client(proxy, 1)).ExpectReset();
        }

        Assert.All(await proxy.LinesOf("server", 2), line => Assert.Equal("pair", line["route"]));
        Given.Echo(new IPEndPoint(IPAddress.Parse("127.0.0.2"), port));
        await (await Given.Client(proxy, 0)).Ask("hello");
        await (await Given.Client(proxy, 1)).Ask("hello");
        await (await Given.Client(proxy, 1)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task A_backup_serves_only_while_the_others_are_down()
    {
        int port = Given.RefusingPort(IPAddress.Parse("127.0.0.2"));
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", Given.Named("backup").Address, "backup", $"127.0.0.2:{port}", "--check", "200ms",
            "--check-fall", "1", "--check-rise", "1");
        proxy.Tolerate("server");
        Assert.Equal(["backup", "backup"], await Served(proxy, 2));
        await proxy.Line("server", line => line["state"] == "down");
        Given.Named("main", new IPEndPoint(IPAddress.Parse("127.0.0.2"), port));
        await proxy.Line("server", line => line["state"] == "up");
        Assert.Equal(["main", "main", "main"], await Served(proxy, 3));
    }

    [Theory(Timeout = Quick)]
    [InlineData("NO\n", "check: not the expected answer")]
    [InlineData("", "check: no answer in time")]
    [InlineData(null, "check: connection refused")]
    public async Task A_server_whose_checks_fail_is_left_alone_until_they_go_well(string? answer, string reason)
    {
        Upstream good = Given.Server(peer => Pong(peer, "+PONG\r\n"));
        int port = Given.RefusingPort(IPAddress.Parse("127.0.0.2"));
        IPEndPoint at = new(IPAddress.Parse("127.0.0.2"), port);
        Upstream? bad = answer is null ? null : Given.Server(peer => Pong(peer, answer), at);
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", good.Address, $"127.0.0.2:{port}", "slow-start=off", "--balance", "roundrobin", "--check", "300ms",
            "--check-send", "PING\\r\\n", "--check-expect", "\\x2bPONG", "--check-fall", "2", "--check-rise", "2");
        proxy.Tolerate("server");
        LogLine down = await proxy.Line("server");
        Assert.Equal(("down", reason, $"127.0.0.2:{port}"), (down["state"], down.Reason, down["server"]));
        int before = bad?.Accepted ?? 0;
        Stopwatch clock = Stopwatch.StartNew();
        for (int i = 0; i < 6; i++)
        {
            await AskPing(proxy);
        }

        Assert.InRange((bad?.Accepted ?? 0) - before, 0, 2 + (clock.ElapsedMilliseconds / 250)); // checks alone
        bad?.Dispose();
        Upstream mended = Given.Server(peer => Pong(peer, "+PONG\r\n"), at);
        LogLine up = await proxy.Line("server", line => line["state"] == "up");
        Assert.Equal(("info", "check passed"), (up.Level, up.Reason));
        int accepted = mended.Accepted;
        await Task.WhenAll(Enumerable.Range(0, 20).Select(_ => AskPing(proxy)));
        Assert.True(mended.Accepted >= accepted + 10, "it gets no clients");
        Assert.Equal(2, proxy.Lines.Count(line => line.Event == "server"));
    }

    [Fact(Timeout = Quick)]
    public async Task Checks_end_when_the_proxy_drains()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--check", "100ms");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        await Wait.Until(() => upstream.Accepted >= 4, "checks");
        proxy.Signal(ProxyProcess.SigTerm);
        await proxy.Line("draining");
        for (int before = -1, i = 0; before != upstream.Accepted; i++)
        {
            Assert.True(i < 10, "the checks go on");
            before = upstream.Accepted; // one may still have been under way
            await Wait.Pause(700);
        }

        await client.Ask("hello");
        client.Dispose();
    }

    /// <summary>A client that has been accepted by the kernel of a server which closes its listening socket at that very
    /// moment is reset, and no proxy can hide that. So the servers here stop listening between two connects.</summary>
    [Fact(Timeout = Slow)]
    public async Task Servers_stop_and_start_under_200_clients_and_no_client_sees_a_failure()
    {
        const int Clients = 200;
        // three addresses, so that a port that is given up is not taken by a client meanwhile
        Upstream[] servers = [.. Enumerable.Range(2, 3).Select(i => Given.Echo(new IPEndPoint(IPAddress.Parse($"127.0.0.{i}"), 0)))];
        ProxyProcess proxy = await Given.Proxy(
            ["127.0.0.1:0", .. servers.Select(server => server.Address), "--fail-timeout", "300ms", "--max-fails", "2"]);
        proxy.Tolerate("server");
        using SemaphoreSlim connecting = new(Clients);
        using CancellationTokenSource ending = new();
        int conversations = 0;
        List<string> failures = [];
        Task[] clients = [.. Enumerable.Range(0, Clients).Select(i => Wait.Apart(() => Converse(i)))];
        for (int i = 0; i < 24; i++)
        {
            int stopped = i % 3;
            await Wait.Pause(100);
            await Restart(() => servers[stopped].Refuse());
            if (i % 2 == 0)
            {
                await Restart(() => servers[(stopped + 1) % 3].Refuse()); // one is left
            }

            await Wait.Pause(200);
            for (int j = 0; j < 3; j++)
            {
                if (servers[j].IsRefusing)
                {
                    servers[j] = Given.Echo(servers[j].Endpoint);
                }
            }
        }

        ending.Cancel();
        await Task.WhenAll(clients);
        Assert.Equal([], failures);
        Assert.True(conversations > 2 * Clients, $"{conversations} conversations");
        Assert.True(proxy.Lines.Count(line => line.Event == "server" && line["state"] == "up") > 2, "no server came back");
        TestContext.Current.TestOutputHelper?.WriteLine($"{conversations} conversations");

        async Task Restart(Action stop)
        {
            for (int i = 0; i < Clients; i++)
            {
                await connecting.WaitAsync(TestContext.Current.CancellationToken);
            }

            stop();
            connecting.Release(Clients);
        }

        async Task Converse(int number)
        {
            Random random = new(number);
            while (!ending.IsCancellationRequested)
            {
                try
                {
                    await connecting.WaitAsync(TestContext.Current.CancellationToken);
                    Peer client;
                    try
                    {
                        client = await Peer.Connect(proxy.Endpoint());
                        await client.Ask($"{number} asks");
                    }
                    finally
                    {
                        connecting.Release();
                    }

                    using (client)
                    {
                        await Wait.Pause(random.Next(300));
                        await client.Ask($"{number} asks again");
                        client.Finish();
                        await client.ExpectEnd();
                    }

                    Interlocked.Increment(ref conversations);
                }
                catch (Exception e) when (e is not OperationCanceledException)
                {
                    lock (failures)
                    {
                        failures.Add(e.Message);
                    }
                }
            }
        }
    }

    [Fact(Timeout = Slow)]
    public async Task Redis_answers_through_a_pair_of_which_one_fails()
    {
        string server = Tool.Need("redis-server", "redis-server");
        string benchmark = Tool.Need("redis-benchmark", "redis-tools");
        int port = Given.FreePorts(1);
        Tool.Background(Given, server, "--port", $"{port}", "--bind", "127.0.0.1", "--save", "", "--dir", Given.Folder);
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", $"127.0.0.1:{Given.RefusingPort()}", $"127.0.0.1:{port}", "--check", "100ms",
            "--check-send", "PING\\r\\n", "--check-expect", "+PONG", "--check-rise", "1",
            "--log-file", Given.Path("log")); // 40,000 lines, for which a test may be too slow a reader
        await Wait.Until(() => Answers(port), "redis to start");
        string report = (await Tool.Run(
            benchmark,
            ["-h", "127.0.0.1", "-p", $"{proxy.Port}", "-n", "20000", "-c", "50", "-k", "0", "-t", "set,get", "--csv"],
            60)).Good();
        Assert.Contains("\"GET\"", report, StringComparison.Ordinal);
        Assert.DoesNotContain("rror", report, StringComparison.Ordinal);
        Assert.Equal(0, await proxy.Stop());
        List<LogLine> lines = [.. System.IO.File.ReadLines(Given.Path("log")).Select(LogLine.Parse).Where(line => line.Event == "connection")];
        Assert.InRange(lines.Count, 20_000, int.MaxValue);
        Assert.DoesNotContain(lines, line => line.End is "SC" or "sC");
    }

    [Fact(Timeout = Quick)]
    public async Task A_name_of_several_addresses_is_several_servers_and_follows_its_name_server()
    {
        string dnsmasq = Tool.Need("dnsmasq", "dnsmasq-base");
        IPAddress address = new([127, (byte)Random.Shared.Next(1, 255), (byte)Random.Shared.Next(1, 255), 53]);
        Launch launch = await Names.Server(Given, address);
        string hosts = Given.Write("web.hosts", "127.0.0.2 web.example\n127.0.0.3 web.example\n");
        string pid = Given.Path("dnsmasq.pid");
        Tool.Background(
            Given, dnsmasq, "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
            $"--addn-hosts={hosts}", $"--listen-address={address}", "--bind-interfaces", $"--pid-file={pid}",
            "--user=root", "--local-service");
        await Wait.Until(() => System.IO.File.Exists(pid), "dnsmasq to start");
        int port = Given.FreePorts(1);
        for (int i = 2; i <= 4; i++)
        {
            Given.Named($"{i}", new IPEndPoint(IPAddress.Parse($"127.0.0.{i}"), port));
        }

        ProxyProcess proxy = await Given.Proxy(
            launch, "--balance", "roundrobin", "--resolve", "1s", "-l", "127.0.0.1:0", "-u", $"web.example:{port}",
            "-l", "127.0.0.1:0", "-u", $"web.example:{port}", "max-connections=1");
        proxy.Tolerate("resolve");
        List<string> served = await Served(proxy, 4);
        Assert.Equal(["2", "2", "3", "3"], served.Order());
        Peer[] bounded = [await Given.Client(proxy, 1), await Given.Client(proxy, 1)];
        Assert.Equal(["2", "3"], new[] { await bounded[0].ReceiveLine(), await bounded[1].ReceiveLine() }.Order());
        Peer old = await Given.Client(proxy);
        Assert.Contains(await old.ReceiveLine(), new[] { "2", "3" });

        await Change("127.0.0.3 web.example\n127.0.0.4 web.example\n");
        await Wait.Until(() => proxy.Lines.Any(line => line.Event == "resolve") || Touch(proxy), "the change to be found");
        Assert.Equal(["3", "3", "4", "4"], (await Served(proxy, 4)).Order());
        await old.Ask("still here");
        byte[] server = new byte[1];
        while (await (await Given.Client(proxy, 1)).ReceiveSome(server) == 0)
        {
            await Wait.Pause(20); // that route does not know yet, and its two servers are full
        }

        Assert.Equal((byte)'4', server[0]); // 3 has kept its count
        await Task.WhenAll(bounded.Select(client => client.Ask("still here")));

        // an address that left the name and comes back still has the connections it had
        await Change("127.0.0.2 web.example\n127.0.0.3 web.example\n");
        await Wait.Until(
            () => proxy.Lines.Count(line => line.Event == "resolve" && line["message"].Contains("127.0.0.2", StringComparison.Ordinal)) > 1
                || Touch(proxy) || Touch(proxy, 1),
            "both routes to know");
        Assert.Equal(0, await (await Given.Client(proxy, 1)).ReceiveSome(server));
        await Change("127.0.0.3 web.example\n127.0.0.4 web.example\n");
        await Wait.Until(
            () => proxy.Lines.Count(line => line.Event == "resolve" && line["message"].Contains("127.0.0.4", StringComparison.Ordinal)) > 3
                || Touch(proxy) || Touch(proxy, 1),
            "both routes to know");

        await Change("");
        LogLine lost = await Until("warn");
        Assert.Contains("its last known addresses serve", lost["message"], StringComparison.Ordinal);
        Assert.Equal(["3", "3", "4", "4"], (await Served(proxy, 4)).Order());
        await old.Ask("still here");

        async Task Change(string text)
        {
            System.IO.File.WriteAllText(hosts, text);
            (await Tool.Run("kill", "-HUP", System.IO.File.ReadAllText(pid).Trim())).Good();
            await Wait.Pause(200);
        }

        async Task<LogLine> Until(string level)
        {
            await Wait.Until(() => proxy.Lines.Any(line => line.Event == "resolve" && line.Level == level) || Touch(proxy),
                $"a line of level {level}");
            return await proxy.Line("resolve", line => line.Level == level);
        }
    }

    /// <summary>A client comes and goes; always false.</summary>
    private static bool Touch(ProxyProcess proxy, int route = 0)
    {
        using Socket client = new(SocketType.Stream, ProtocolType.Tcp);
        client.Connect(proxy.Endpoint(route));
        client.Receive(new byte[1]);
        return false;
    }

    private static bool Answers(int port)
    {
        using Socket probe = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            probe.Connect(IPAddress.Loopback, port);
            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }

    private static async Task Pong(Peer peer, string answer)
    {
        await peer.Receive(6);
        await peer.Send(answer);
        if (answer.Length > 0)
        {
            peer.Finish();
        }

        await peer.Drain();
        peer.Dispose();
    }

    private async Task AskPing(ProxyProcess proxy)
    {
        Peer client = await Given.Client(proxy);
        await client.Send("PING\r\n");
        await client.ReceiveText("+PONG\r\n");
    }

    private async Task<List<string>> Served(ProxyProcess proxy, int count)
    {
        List<string> served = [];
        for (int i = 0; i < count; i++)
        {
            served.Add(await (await Given.Client(proxy)).ReceiveLine());
        }

        return served;
    }
}
