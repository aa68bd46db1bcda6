using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Net;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>Which server a client gets, and when it has to wait for one.</summary>
public sealed class BalanceTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task Round_robin_gives_each_its_turns_by_weight_and_a_drained_one_none()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "--balance", "roundrobin", Given.Named("a").Address, "weight=3",
            Given.Named("b").Address, $"{Given.Named("c").Address} weight=0");
        Assert.Equal("aabaaaba", string.Concat(await Served(proxy, 8)));
    }

    [Fact(Timeout = Quick)]
    public async Task The_same_client_gets_the_same_server_from_every_proxy()
    {
        string[] servers = [.. "abcde".Select(name => Given.Named($"{name}").Address)];
        ProxyProcess first = await Given.Proxy(["127.0.0.1:0", "--balance", "source", .. servers]);
        ProxyProcess second = await Given.Proxy(["--balance", "source", ":0", .. servers.Reverse()]);
        HashSet<string> seen = [];
        for (int i = 1; i <= 120; i++)
        {
            IPEndPoint from = new(IPAddress.Parse($"127.1.2.{i}"), 0);
            string server = await (await Given.Client(first.Endpoint(), from)).ReceiveLine();
            Assert.Equal(server, await (await Given.Client(second.Endpoint(), from)).ReceiveLine());
            Assert.Equal(server, await (await Given.Client(first.Endpoint(), from)).ReceiveLine());
            seen.Add(server);
        }

        Assert.Equal(5, seen.Count);
    }

    [Fact(Timeout = Quick)]
    public async Task First_fills_one_server_after_the_other_and_then_the_backup()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", Given.Named("a").Address, "max-connections=2", Given.Named("b").Address,
            "max-connections=1", Given.Named("c").Address, "backup", "--balance", "first");
        Assert.Equal("aabcc", string.Concat(await Served(proxy, 5)));
    }

    [Fact(Timeout = Quick)]
    public async Task Clients_beyond_what_the_servers_take_wait_in_order_and_leave()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", upstream.Address, "max-connections=1", "--queue", "3", "--queue-timeout", "30s");
        Peer[] clients = new Peer[5];
        for (int i = 0; i < 5; i++)
        {
            clients[i] = await Given.Client(proxy);
            await clients[i].Send(i == 2 ? "" : $"client {i}\n");
            if (i == 0)
            {
                await Wait.Until(() => upstream.Accepted == 1, "the first client to be served");
            }
        }

        LogLine refused = await proxy.Connection(clients[4]); // four wait or are served
        Assert.Equal(("PQ", "servers full"), (refused.End, refused.Reason));
        Assert.Equal("client 0", await (await upstream.Accept()).ReceiveLine());
        string left = clients[2].Local;
        clients[2].Finish(); // without having sent anything: it has no business here any more
        LogLine gone = await proxy.Connection(left);
        Assert.Equal(("CQ", "client left"), (gone.End, gone.Reason));
        clients[3].Finish(); // this one has asked, and may still be answered
        await Wait.Pause(1_500);
        Assert.Equal(1, upstream.Accepted);

        clients[0].Reset();
        Peer server = await upstream.Accept();
        Assert.Equal("client 1", await server.ReceiveLine());
        clients[1].Reset();
        server = await upstream.Accept();
        Assert.Equal("client 3", await server.ReceiveLine());
        await server.Send("answer\n");
        Assert.Equal("answer", await clients[3].ReceiveLine());
        Assert.Equal(3, upstream.Accepted);
    }

    [Fact(Timeout = Quick)]
    public async Task Who_is_reset_while_it_waits_leaves_and_who_waits_too_long_is_closed()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", upstream.Address, "max-connections=1", "--queue", "5", "--queue-timeout", "2s");
        Peer served = await Given.Client(proxy);
        await upstream.Accept();
        Peer patient = await Given.Client(proxy);
        Peer hasty = await Given.Client(proxy);
        await hasty.Send("hello");
        string left = hasty.Local;
        hasty.Reset();
        Assert.Equal("CQ", (await proxy.Connection(left, seconds: 1.8)).End);
        await patient.ExpectEnd(); // FIN: it was not served, nothing was cut
        LogLine line = await proxy.Connection(patient);
        Assert.Equal(("sQ", "queue timeout", "-"), (line.End, line.Reason, line["server"]));
        Assert.InRange(line.Number("duration_ms"), 1_900, 4_000);
        await served.Send("x");
    }

    [Fact(Timeout = Quick)]
    public async Task Without_a_queue_a_client_beyond_what_the_servers_take_is_closed_at_once()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", Given.Named("a").Address, "max-connections=2", Given.Named("b").Address, "weight=0");
        Assert.Equal(["a", "a"], await Served(proxy, 2));
        Peer client = await Given.Client(proxy);
        await client.ExpectEnd();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("PQ", "-", "-"), (line.End, line["upstream"], line["server"]));
    }

    [Fact(Timeout = Slow)]
    public async Task Many_clients_share_few_places_and_none_is_lost()
    {
        int open = 0;
        int most = 0;
        async Task Serve(Peer peer)
        {
            lock (Given)
            {
                most = Math.Max(most, ++open);
            }

            byte[] question = await peer.Receive(5);
            lock (Given)
            {
                open--;
            }

            await peer.Send(question);
            peer.Dispose();
        }

        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", Given.Server(Serve).Address, "max-connections=3", Given.Server(Serve).Address,
            "max-connections=2", "--queue", "200", "--queue-timeout", "30s");
        await Wait.Many(2_000, 100, async i =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            await client.Ask(i.ToString("d5", CultureInfo.InvariantCulture));
        });
        Assert.InRange(most, 2, 5);
        List<LogLine> lines = await proxy.LinesOf("connection", 2_000);
        Assert.All(lines, line => Assert.Contains(line.End, new[] { "--", "CD", "SD" }));
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
