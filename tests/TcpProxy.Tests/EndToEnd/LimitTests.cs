using System;
using System.Diagnostics;
using System.Globalization;
using System.Linq;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class LimitTests : EndToEndTest
{
    public static readonly TheoryData<int> Quotas = [1, 1_000, 65_535, 65_536, 65_537, 1_000_000, 5_000_000];

    [Theory(Timeout = Quick)]
    [MemberData(nameof(Quotas))]
    public async Task Exactly_the_quota_passes_up_and_the_answer_still_comes(int quota)
    {
        Pattern pattern = new(quota);
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--max-bytes-up", $"{quota}");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        Task sending = SendMore(client, pattern, quota + 100_000L);
        await server.Receive(pattern, quota);
        await server.ExpectEnd();
        await server.Send("enough");
        await client.ReceiveText("enough");
        server.Dispose();
        await client.Drain();
        await sending;

        LogLine line = await proxy.Connection(client);
        Assert.Equal(("PD", "byte quota up"), (line.End, line.Reason));
        Assert.Equal((quota, 6), (line.BytesUp, line.BytesDown));
    }

    [Theory(Timeout = Quick)]
    [MemberData(nameof(Quotas))]
    public async Task Exactly_the_quota_passes_down(int quota)
    {
        Pattern pattern = new(quota);
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", upstream.Address, "--max-bytes-down", $"{quota}");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        Task sending = SendMore(server, pattern, quota + 100_000L);
        await client.Receive(pattern, quota);
        await client.ExpectEnd();
        client.Dispose();
        await server.Drain();
        await sending;

        LogLine line = await proxy.Connection();
        Assert.Equal(("PD", "byte quota down"), (line.End, line.Reason));
        Assert.Equal((0, quota), (line.BytesUp, line.BytesDown));
    }

    [Fact(Timeout = Quick)]
    public async Task After_the_quota_a_silent_server_does_not_hold_the_connection()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--max-bytes-up", "10");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        Stopwatch clock = Stopwatch.StartNew();
        await client.Send("0123456789abcdef");
        Assert.Equal("0123456789", Encoding.ASCII.GetString(await server.ReceiveToEnd()));
        await client.Drain(10);
        LogLine line = await proxy.Connection(client);
        Assert.InRange(clock.ElapsedMilliseconds, 500, 8_000);
        Assert.Equal(("PD", "byte quota up", 10), (line.End, line.Reason, line.BytesUp));
    }

    [Fact(Timeout = Quick)]
    public async Task After_the_quota_a_reset_by_the_server_is_no_end_of_its_answer()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--max-bytes-up", "10");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Send("0123456789abcdefghij");
        client.Finish(); // nothing pends on its socket, and the runtime has no reason of its own to reset it
        Assert.Equal("0123456789", Encoding.ASCII.GetString(await server.ReceiveToEnd()));
        await server.Send(new byte[100_000]);
        await client.Receive(1_000);
        server.Reset();
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("PD", "byte quota up", 10), (line.End, line.Reason, line.BytesUp));
    }

    [Fact(Timeout = Quick)]
    public async Task Below_the_quota_nothing_is_different()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", upstream.Address, "--max-bytes-up", "1k", "--max-bytes-down", "1k");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        Assert.Equal("--", (await proxy.Connection(client)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task Over_the_connection_limit_a_client_is_disconnected_at_once()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--max-connections", "2");
        Peer first = await Given.Client(proxy);
        Peer second = await Given.Client(proxy);
        await first.Ask("one");
        await second.Ask("two");

        for (int i = 0; i < 5; i++)
        {
            Stopwatch clock = Stopwatch.StartNew();
            Peer third = await Given.Client(proxy);
            await third.ExpectEnd();
            Assert.True(
                clock.ElapsedMilliseconds < 2_000, $"disconnected after {clock.ElapsedMilliseconds} ms");
            LogLine line = await proxy.Connection(third);
            Assert.Equal(("PC", "connection limit", "-"), (line.End, line.Reason, line["server"]));
        }

        Assert.Equal(2, upstream.Accepted);
        await first.Ask("still here");
        first.Finish();
        await first.ExpectEnd();
        await proxy.Connection(first);
        Peer next = await Given.Client(proxy);
        await next.Ask("a place is free");
    }

    [Fact(Timeout = Quick)]
    public async Task The_built_in_servers_have_quotas_too()
    {
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", "echo", "--max-bytes-up", "3",
            "-l", "127.0.0.1:0", "-u", "echo", "--max-bytes-down", "3",
            "-l", "127.0.0.1:0", "-u", "discard", "--max-bytes-up", "3");
        string[] reasons = ["byte quota up", "byte quota down", "byte quota up"];
        for (int i = 0; i < reasons.Length; i++)
        {
            Peer client = await Given.Client(proxy, i);
            await client.Send("hello");
            (byte[] data, _) = await client.Drain(10);
            Assert.Equal(i == 2 ? "" : "hel", Encoding.ASCII.GetString(data));
            LogLine line = await proxy.Connection(client);
            Assert.Equal(("PD", reasons[i]), (line.End, line.Reason));
        }
    }

    [Theory(Timeout = Quick)]
    [InlineData("echo")]
    [InlineData("server")]
    public async Task What_comes_beyond_the_quota_does_not_destroy_what_has_passed(string kind)
    {
        const int Quota = 3_000_000;
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", kind == "echo" ? kind : upstream.Address, "--max-bytes-down", $"{Quota}");
        Peer client = await Given.Client(proxy);
        Pattern pattern = new(1);
        Task sending = client.Send(pattern, 3 * Quota);
        await Wait.Pause(1_000); // a slow reader
        await client.Receive(pattern, Quota);
        await client.ExpectEnd();
        await Record.ExceptionAsync(() => sending); // it may be cut short
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("PD", "byte quota down", Quota), (line.End, line.Reason, line.BytesDown));
    }

    [Fact(Timeout = Quick)]
    public async Task Before_the_first_listen_the_connection_limit_bounds_all_routes_together()
    {
        ProxyProcess proxy = await Given.Proxy(
            "--max-connections", "3",
            "-l", "127.0.0.1:0", "-u", "echo", "-l", "127.0.0.1:0", "-u", "echo", "--max-connections", "1");
        Peer first = await Given.Client(proxy, 0);
        await first.Ask("hello");
        await (await Given.Client(proxy, 1)).Ask("hello");
        await (await Given.Client(proxy, 1)).ExpectEnd();
        await (await Given.Client(proxy, 0)).Ask("hello");
        await (await Given.Client(proxy, 0)).ExpectEnd();
        first.Finish();
        await first.ExpectEnd();
        await proxy.Connection(first);
        await (await Given.Client(proxy, 0)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task A_connection_limit_is_never_passed_under_a_rush()
    {
        int open = 0;
        int most = 0;
        Upstream upstream = Given.Server(async peer =>
        {
            int now = Interlocked.Increment(ref open);
            InterlockedMax(ref most, now);
            await peer.Send("x");
            await peer.Drain();
            Interlocked.Decrement(ref open);
            peer.Dispose();
        });
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--max-connections", "5");
        await Wait.Many(500, 40, async i =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            (byte[] data, _) = await ReceiveOne(client);
            Assert.InRange(data.Length, 0, 1);
        });
        await Wait.Until(
            () => proxy.Lines.Sum(l => l.Event == "refused" ? int.Parse(l["message"].Split(' ')[0], CultureInfo.InvariantCulture) : l.Event == "connection" ? 1 : 0) == 500,
            "every client in the log, or counted");
        Assert.InRange(proxy.Lines.Count(l => l.Event == "connection" && l.End == "PC"), 1, 499);

        // the server sees the end of a connection a moment after the proxy has given its place to the next
        Assert.InRange(most, 1, 10);

        static async Task<(byte[] Data, int Count)> ReceiveOne(Peer peer)
        {
            byte[] one = new byte[1];
            int count = await peer.Socket.ReceiveAsync(one.AsMemory());
            return (one[..count], count);
        }

        static void InterlockedMax(ref int target, int value)
        {
            for (int seen = target; seen < value;)
            {
                seen = Interlocked.CompareExchange(ref target, value, seen);
            }
        }
    }

    /// <summary>Sends until all is sent or the other side will not have it.</summary>
    private static async Task SendMore(Peer peer, Pattern pattern, long length)
    {
        try
        {
            await peer.Send(pattern, length);
        }
        catch (SocketException)
        {
            // the quota is allowed to end the connection at any moment after it is spent
        }
    }
}
