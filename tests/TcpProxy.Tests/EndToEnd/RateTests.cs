using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Linq;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

[Collection("heavy")]
public sealed class RateTests : EndToEndTest
{
    private const int Kilo = 1 << 10;
    private const int Mega = 1 << 20;

    [Theory(Timeout = Quick)]
    [InlineData("--rate-up", "10k/s", 10 * Kilo)]
    [InlineData("--rate-down", "1m/s", Mega)]
    [InlineData("--rate-down", "60m/s", 60 * Mega)]
    [InlineData("--rate-up", "500m/s", 500 * Mega)]
    [InlineData("--rate-total-up", "1m/s", Mega)]
    public async Task A_stream_passes_at_its_rate_and_evenly(string option, string text, int rate)
    {
        double slack = Tool.IsPortable ? 0.1 : 0.03; // what is compiled as it runs does not start at once
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, option, text);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        bool isUp = option.EndsWith("up", StringComparison.Ordinal);
        (Peer writer, Peer reader) = isUp ? (client, server) : (server, client);
        _ = writer.Push();
        List<(double Time, long Bytes)> seen = await Watch(reader, seconds: 5.5);

        (double time, long bytes) = seen.First(e => e.Time > 0.5); // after what a full bucket gives at once
        double measured = (seen[^1].Bytes - bytes) / (seen[^1].Time - time);
        Assert.InRange(measured / rate, 1 - slack, 1 + slack);
        int start = 0;
        for (int i = 0; i < seen.Count; i++)
        {
            while (seen[start].Time < seen[i].Time - 0.1)
            {
                start++;
            }

            Assert.InRange(seen[i].Bytes - seen[start].Bytes, 0, rate * 0.2); // 100 ms' worth, and no more than that at once
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Those_who_share_a_total_have_equal_parts_and_other_routes_are_not_slowed()
    {
        Tool.NeedLibc("what is compiled as it runs does not start at once");
        const int Count = 8;
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", upstream.Address, "--rate-total-down", "8m/s",
            "-l", "127.0.0.1:0", "-u", "echo");
        List<Peer> readers = [];
        for (int i = 0; i < Count; i++)
        {
            (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
            _ = server.Push();
            readers.Add(client);
        }

        Task<List<(double Time, long Bytes)>[]> watches = Task.WhenAll(readers.ConvertAll(reader => Watch(reader, 4)));
        Peer other = await Given.Client(proxy, 1);
        Stopwatch clock = Stopwatch.StartNew();
        for (int i = 0; i < 100; i++)
        {
            await other.Ask("hello");
        }

        Assert.InRange(clock.ElapsedMilliseconds, 0, 2_000);
        // whoever connected first had the whole rate until the others came: what counts is what passed when all were there
        double[] rates = [.. (await watches).Select(
            seen => (seen[^1].Bytes - seen.First(e => e.Time > 1).Bytes) / (seen[^1].Time - seen.First(e => e.Time > 1).Time))];
        Assert.InRange(rates.Sum() / (8 * Mega), 0.95, 1.05);
        Assert.All(rates, rate => Assert.InRange(rate / Mega, 0.8, 1.2));
    }

    [Fact(Timeout = Quick)]
    public async Task The_sender_is_held_back_and_nothing_is_buffered()
    {
        Tool.NeedLibc("the memory is that of the native binary");
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--rate-up", "100k/s");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        long before = proxy.Resident;
        long sent = 0;
        _ = client.Push(count => Interlocked.Add(ref sent, count));
        long received = (await Watch(server, 3))[^1].Bytes;
        Assert.InRange(Interlocked.Read(ref sent) - received, 0, 16 * Mega); // in the kernel's queues
        Assert.InRange(proxy.Resident - before, long.MinValue, 2 * Mega);
    }

    [Theory(Timeout = Quick)]
    [InlineData("200k/s", 300_000)] // small slices
    [InlineData("100m/s", 80_000_000)] // full buffers: spliced
    public async Task All_bytes_arrive_unaltered_and_half_close_works(string rate, int length)
    {
        Pattern pattern = new(5);
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", upstream.Address, "--rate-up", rate, "--rate-down", rate, "--rate-total-down", rate);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await Task.WhenAll(
            Wait.Apart(() => client.Send(pattern, length)), Wait.Apart(() => server.Receive(pattern, length)));
        client.Finish();
        await server.ExpectEnd();
        await Task.WhenAll(
            Wait.Apart(() => server.Send(pattern, length)), Wait.Apart(() => client.Receive(pattern, length)));
        server.Finish();
        await client.ExpectEnd();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("--", length, length), (line.End, line.BytesUp, line.BytesDown));
    }

    [Fact(Timeout = Quick)]
    public async Task A_quota_is_exact_and_a_lifetime_ends_one_that_waits_for_its_rate()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", upstream.Address, "--rate-up", "100k/s", "--max-bytes-up", "77777",
            "-l", "127.0.0.1:0", "-u", upstream.Address, "--rate-total-up", "1/s", "--max-lifetime", "1s");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        _ = client.Push();
        Assert.Equal(77_777, (await server.ReceiveToEnd()).Length);
        server.Finish();
        Assert.Equal(("PD", 77_777), ((await proxy.Connection(client)).End, (await proxy.Connection(client)).BytesUp));

        List<Peer> waiting = [];
        for (int i = 0; i < 20; i++)
        {
            (Peer one, _) = await Given.Bridge(proxy, upstream, 1);
            await one.Send("many bytes, for which the rate is too low");
            waiting.Add(one);
        }

        Stopwatch clock = Stopwatch.StartNew();
        foreach (Peer one in waiting)
        {
            Assert.Equal("max lifetime", (await proxy.Connection(one)).Reason);
        }

        Assert.InRange(clock.ElapsedMilliseconds, 0, 5_000); // in its line the last would have waited for 20 s
    }

    [Fact(Timeout = Quick)]
    public async Task A_client_that_resets_while_it_waits_for_its_rate_is_noticed()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--rate-total-up", "1/s");
        List<Peer> clients = [];
        for (int i = 0; i < 10; i++)
        {
            (Peer one, _) = await Given.Bridge(proxy, upstream);
            await one.Send("many bytes");
            clients.Add(one);
        }

        string last = clients[^1].Local;
        clients[^1].Reset();
        await Wait.Until(() => proxy.Lines.Any(l => l.Has("client") && l["client"] == last), "the reset", 6);
    }

    [Fact(Timeout = Quick)]
    public async Task Of_echo_the_lower_rate_holds()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--rate-up", "10m/s", "--rate-down", "100k/s");
        Peer client = await Given.Client(proxy);
        _ = client.Push();
        Assert.InRange((await Watch(client, 3))[^1].Bytes / (300.0 * Kilo), 0.9, 1.1);
    }

    /// <summary>How much had come in all, each time that something came.</summary>
    private static Task<List<(double Time, long Bytes)>> Watch(Peer peer, double seconds) => Wait.Apart(async () =>
    {
        List<(double, long)> seen = [(0, 0)];
        Stopwatch clock = Stopwatch.StartNew();
        byte[] buffer = new byte[Mega];
        for (long total = 0; clock.Elapsed.TotalSeconds < seconds;)
        {
            total += await peer.ReceiveSome(buffer);
            seen.Add((clock.Elapsed.TotalSeconds, total));
        }

        return seen;
    });
}
