using System;
using System.Collections.Generic;
using System.Linq;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

[Collection("heavy")]
public sealed class BulkTests : EndToEndTest
{
    private const long Gigabyte = 1L << 30;

    [Theory(Timeout = Slow)]
    [InlineData("auto")]
    [InlineData("off")]
    public async Task A_gigabyte_both_ways_at_once_through_a_chain_of_three_proxies(string splice)
    {
        Pattern up = new(1);
        Pattern down = new(2);
        Upstream upstream = Given.Server();
        ProxyProcess third = await Given.Proxy("127.0.0.1:0", upstream.Address, "--splice", splice);
        ProxyProcess second = await Given.Proxy("127.0.0.1:0", third.Addresses[0], "--splice", splice);
        ProxyProcess first = await Given.Proxy("127.0.0.1:0", second.Addresses[0], "--splice", splice);
        (Peer client, Peer server) = await Given.Bridge(first, upstream);

        await Task.WhenAll(
            Wait.Apart(() => SendAll(client, up)),
            Wait.Apart(() => SendAll(server, down)),
            Wait.Apart(() => ReceiveAll(server, up)),
            Wait.Apart(() => ReceiveAll(client, down)));
        client.Dispose();
        server.Dispose();

        foreach (ProxyProcess proxy in new[] { first, second, third })
        {
            LogLine line = await proxy.Connection();
            Assert.Equal((Gigabyte, Gigabyte, "--"), (line.BytesUp, line.BytesDown, line.End));
        }

        static async Task SendAll(Peer peer, Pattern pattern)
        {
            await peer.Send(pattern, Gigabyte, seconds: 200);
            peer.Finish();
        }

        static async Task ReceiveAll(Peer peer, Pattern pattern)
        {
            await peer.Receive(pattern, Gigabyte, seconds: 200);
            await peer.ExpectEnd();
        }
    }

    [Fact(Timeout = Slow)]
    public async Task A_stream_whose_connection_to_the_server_is_killed_is_reset_and_does_not_end()
    {
        Tool.NeedRoot("ss -K");
        string ss = Tool.Need("ss", "iproute2");
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        for (int i = 0; i < 20; i++)
        {
            (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
            client.Socket.ReceiveBufferSize = 256 << 10; // else the queues take more than is pushed in this time
            Task pushing = server.Push();
            byte[] buffer = new byte[64 << 10];
            for (int j = 0; j < 10; j++)
            {
                await client.ReceiveSome(buffer);
                await Wait.Pause(20); // a slow reader: the proxy always finds more to splice
            }

            Outcome killed = await Tool.Run(ss, "-K", "dst", "127.0.0.1", "dport", "=", $":{upstream.Port}");
            bool isKilled = await Task.WhenAny(pushing, Wait.Pause(2_000)) == pushing; // ss says so of those, too, that it cannot kill
            Assert.SkipUnless(isKilled, $"ss -K kills nothing here (CONFIG_INET_DIAG_DESTROY): {killed.Err}");
            Assert.Equal(SocketError.ConnectionReset, (await client.Drain(30)).Error);
            LogLine line = await proxy.Connection(client);
            Assert.Equal(("SD", "upstream reset"), (line.End, line.Reason));
        }
    }

    [Theory(Timeout = Slow)]
    [InlineData("auto")]
    [InlineData("off")]
    public async Task Two_hundred_connections_of_random_sizes_and_pauses_lose_no_byte(string splice)
    {
        int seed = Random.Shared.Next();
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--splice", splice);
        long[] lengths = await Task.WhenAll(
            Enumerable.Range(0, 200).Select(i => Wait.Apart(() => Exchange(seed + i))));

        List<LogLine> lines = await proxy.LinesOf("connection", 200);
        Assert.Equal(lengths.Sum(), lines.Sum(l => l.BytesUp));
        Assert.Equal(lengths.Sum(), lines.Sum(l => l.BytesDown));
        Assert.All(lines, l => Assert.Equal("--", l.End));

        async Task<long> Exchange(int own)
        {
            Random random = new(own);
            Pattern pattern = new(own);
            Peer client = await Given.Client(proxy);
            long length = random.Next(4) == 0 ? random.Next(100) : random.Next(2_000_000);
            try
            {
                Task receiving = client.Receive(pattern, length);
                for (long at = 0; at < length;)
                {
                    int count = (int)Math.Min(
                        length - at, random.Next(1, random.Next(2) == 0 ? 2_000 : 200_000));
                    await client.Send(pattern, count, at);
                    at += count;
                    if (random.Next(3) == 0)
                    {
                        await Wait.Pause(random.Next(20));
                    }
                }

                client.Finish();
                await receiving;
                await client.ExpectEnd();
                client.Dispose();
                return length;
            }
            catch (Exception e)
            {
                throw new InvalidOperationException($"seed {own}: {e.Message}", e);
            }
        }
    }
}
