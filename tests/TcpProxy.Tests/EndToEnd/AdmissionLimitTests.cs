using System;
using System.Collections.Generic;
using System.Diagnostics;
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

    private Task<Peer> From(EndPoint to, string address) => Given.Client(to, new IPEndPoint(IPAddress.Parse(address), 0));
}
