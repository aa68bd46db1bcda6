using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.Linq;
using System.Net;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class AdmissionLimitTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task An_address_has_its_own_number_of_connections()
    {
        ProxyProcess proxy = await Given.Proxy("*:0", "echo", "--max-connections-per-ip", "2");
        IPEndPoint v4 = new(IPAddress.Loopback, proxy.Port);
        Peer first = await From(v4, "127.0.0.1");
        await first.Ask("one");
        await (await From(v4, "127.0.0.1")).Ask("two");
        Peer third = await From(v4, "127.0.0.1");
        await third.ExpectEnd();
        LogLine line = await proxy.Connection(third);
        Assert.Equal(("PC", "connection limit of the address", "-"), (line.End, line.Reason, line["server"]));
        await (await From(v4, "127.9.8.7")).Ask("another address");
        await (await From(new IPEndPoint(IPAddress.IPv6Loopback, proxy.Port), "::1")).Ask("another family");

        first.Finish();
        await first.ExpectEnd();
        await proxy.Connection(first);
        await (await From(v4, "127.0.0.1")).Ask("a place is free");
        await (await From(v4, "127.0.0.1")).ExpectEnd();
    }

    [Fact(Timeout = Quick)]
    public async Task The_address_in_a_PROXY_header_is_the_one_that_counts()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--max-connections-per-ip", "1", "--accept-proxy", "127.0.0.0/8");
        Peer[] clients = new Peer[3];
        for (int i = 0; i < 3; i++)
        {
            clients[i] = await Given.Client(proxy);
            await clients[i].Send($"PROXY TCP4 192.0.2.{i / 2} 192.0.2.9 1{i} 80\r\n");
            if (i != 1)
            {
                await clients[i].Ask("hello");
            }
            else
            {
                await clients[i].ExpectEnd();
            }
        }

        await proxy.Connection(l => l["client"] == "192.0.2.0:11" && l.Reason == "connection limit of the address");
    }

    [Theory(Timeout = Quick)]
    [InlineData("--connect-rate", "connect rate", false)]
    [InlineData("--connect-rate-per-ip", "connect rate of the address", true)]
    public async Task What_comes_faster_than_the_connect_rate_is_closed(string option, string reason, bool isPerAddress)
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", option, "1/s 3");
        Stopwatch clock = Stopwatch.StartNew();
        List<Peer> clients = [];
        for (int i = 0; i < 20; i++)
        {
            clients.Add(await Given.Client(proxy));
            clients[^1].Finish();
            await clients[^1].ExpectEnd();
        }

        List<LogLine> lines = await proxy.LinesOf("connection", 20);
        int most = 3 + (int)clock.Elapsed.TotalSeconds + 1;
        Assert.InRange(lines.Count(l => l.End == "--"), 3, most);
        Assert.All(lines.Where(l => l.End != "--"), l => Assert.Equal(("PC", reason), (l.End, l.Reason)));
        Peer other = await From(proxy.Endpoint(), "127.1.2.3");
        if (isPerAddress)
        {
            await other.Ask("hello");
        }

        await Wait.Pause(1_100);
        await (await Given.Client(proxy)).Ask("it is time again");
    }

    [Fact(Timeout = Quick)]
    public async Task Many_addresses_take_little_memory()
    {
        const int Count = 20_000;
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--max-connections-per-ip", "5", "--connect-rate-per-ip", "100/s", "-q");
        await Connect(2_000);
        long before = proxy.Resident;
        await Connect(Count);
        Assert.InRange(proxy.Resident - before, long.MinValue, 8 << 20);

        Task Connect(int count) => Wait.Many(count, 16, async i =>
        {
            using Peer peer = await Peer.Connect(
                proxy.Endpoint(), new IPEndPoint(new IPAddress([127, (byte)(1 + (i >> 16)), (byte)(i >> 8), (byte)i]), 0));
            peer.Finish();
            await peer.ExpectEnd();
        });
    }

    [Theory(Timeout = Quick)]
    [InlineData("--max-connections")]
    [InlineData("--max-connections-per-ip")]
    public async Task Refused_clients_are_reset_where_that_is_asked_for(string option)
    {
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", "echo", option, "1", "--refuse", "reset",
            "-l", "127.0.0.1:0", "-u", "echo", option, "1");
        for (int i = 0; i < 2; i++)
        {
            Peer first = await Given.Client(proxy, i);
            await first.Ask("hello");
            Peer second = await Given.Client(proxy, i);
            await (i == 0 ? second.ExpectReset() : second.ExpectEnd());
            first.Finish();
            await first.ExpectEnd(); // one that was served ends well
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Over_the_limit_clients_wait_in_order_where_there_is_a_queue()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--max-connections", "1", "--queue", "2", "--queue-timeout", "30s");
        Peer[] clients = new Peer[3];
        for (int i = 0; i < 3; i++)
        {
            clients[i] = await Given.Client(proxy);
            if (i == 0)
            {
                await clients[i].Ask("hello");
            }
            else
            {
                await clients[i].Send($"{i}");
            }
        }

        Peer fourth = await Given.Client(proxy);
        await fourth.ExpectEnd();
        Assert.Equal("connection limit", (await proxy.Connection(fourth)).Reason);
        for (int i = 1; i < 3; i++)
        {
            Task<byte[]> answer = clients[i].Receive(1);
            await Wait.Pause(300);
            Assert.False(answer.IsCompleted, $"{i} is served before its turn");
            clients[i - 1].Finish();
            await clients[i - 1].Drain();
            Stopwatch clock = Stopwatch.StartNew();
            Assert.Equal([(byte)('0' + i)], await answer);
            Assert.InRange(clock.ElapsedMilliseconds, 0, 500); // who leaves calls the next: the sweep would come within a second
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Who_waits_too_long_or_leaves_is_taken_out_of_the_queue()
    {
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", "echo", "--max-connections", "1", "--queue", "5", "--queue-timeout", "1s",
            "-l", "127.0.0.1:0", "-u", "echo", "--max-connections", "1", "--queue", "5", "--queue-timeout", "30s");
        for (int i = 0; i < 2; i++)
        {
            await (await Given.Client(proxy, i)).Ask("hello");
        }

        Peer patient = await Given.Client(proxy, 0);
        Peer leaving = await Given.Client(proxy, 1);
        leaving.Finish();
        await patient.ExpectEnd();
        Assert.Equal(("sQ", "queue timeout"), ((await proxy.Connection(patient)).End, (await proxy.Connection(patient)).Reason));
        Assert.Equal(("CQ", "client left"), ((await proxy.Connection(leaving)).End, (await proxy.Connection(leaving)).Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task Room_in_another_route_is_noticed_by_those_who_wait_for_the_process()
    {
        ProxyProcess proxy = await Given.Proxy(
            "--max-connections", "1", "--queue", "5", "--queue-timeout", "30s",
            "-l", "127.0.0.1:0", "-u", "echo", "-l", "127.0.0.1:0", "-u", "echo");
        Peer first = await Given.Client(proxy, 0);
        await first.Ask("hello");
        Peer second = await Given.Client(proxy, 1);
        await second.Send("x");
        first.Finish();
        await first.ExpectEnd();
        Assert.Equal("x"u8.ToArray(), await second.Receive(1));
    }

    [Fact(Timeout = Quick)]
    public async Task Of_a_flood_of_refused_clients_the_log_has_some_and_a_count_of_the_rest()
    {
        const int Count = 2_000;
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--max-connections", "1");
        Peer first = await Given.Client(proxy);
        await first.Ask("hello");
        Stopwatch clock = Stopwatch.StartNew();
        await Wait.Many(Count, 8, async _ =>
        {
            using Peer peer = await Peer.Connect(proxy.Endpoint());
            await peer.Drain();
        });
        int seconds = (int)clock.Elapsed.TotalSeconds;
        await Wait.Until(() => Logged() + LeftOut() == Count, "every refused client in the log or counted");
        Assert.InRange(Logged(), 100, 100 * (seconds + 2));
        Assert.InRange(proxy.Lines.Count(l => l.Event == "refused"), 1, seconds + 2);
        Assert.All(proxy.Lines.Where(l => l.Event == "refused"), l => Assert.Equal("127.0.0.1:0", l["route"]));
        await first.Ask("still here");

        int Logged() => proxy.Lines.Count(l => l.Event == "connection" && l.End == "PC");

        int LeftOut() => proxy.Lines.Where(l => l.Event == "refused").Sum(l => int.Parse(l["message"].Split(' ')[0], CultureInfo.InvariantCulture));
    }

    [Fact(Timeout = Quick)]
    public async Task Lifetimes_with_jitter_end_one_after_the_other()
    {
        const int Count = 30;
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--max-lifetime", "1s 2s");
        for (int i = 0; i < Count; i++)
        {
            await (await Given.Client(proxy)).Ask("hello");
        }

        List<LogLine> lines = await proxy.LinesOf("connection", Count);
        Assert.All(lines, l => Assert.Equal("max lifetime", l.Reason));
        long[] lives = [.. lines.Select(l => l.Number("duration_ms")).Order()];
        Assert.InRange(lives[0], 990, 1_900);
        Assert.InRange(lives[^1], 2_100, 3_800);
        Assert.InRange(lives[Count / 2], 1_400, 2_900);
    }

    private Task<Peer> From(EndPoint to, string address) => Given.Client(to, new IPEndPoint(IPAddress.Parse(address), 0));
}
