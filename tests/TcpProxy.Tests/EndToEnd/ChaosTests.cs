using System;
using System.Collections.Generic;
using System.Linq;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>Both ends do at random whatever a TCP peer can do; what must hold afterwards holds.</summary>
[Collection("heavy")]
public sealed class ChaosTests : EndToEndTest
{
    [Fact(Timeout = Slow)]
    public async Task Whatever_both_ends_do_nothing_is_left_and_every_connection_has_its_line()
    {
        const int Count = 1_500;
        const int Limit = 400; // those who were reset count until the proxy has noticed
        int seed = Random.Shared.Next();
        int accepted = 0;
        Upstream upstream = Given.Server(async peer =>
        {
            Random random = new(seed - Interlocked.Increment(ref accepted));
            await Misbehave(peer, random);
        });
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", upstream.Address, "--max-connections", $"{Limit}",
            "--fin-timeout", "2s", "--idle-timeout", "3s");
        int descriptors = proxy.Descriptors;
        List<string> addresses = [];
        int begun = 0;
        await Wait.Many(Count, 40, async i =>
        {
            int ahead = Interlocked.Increment(ref begun) - (Limit * 3 / 4);
            await proxy.LinesOf("connection", Math.Max(0, ahead)); // or a proxy that is behind would be full of those who have gone
            Peer client = await Peer.Connect(proxy.Endpoint());
            lock (addresses)
            {
                addresses.Add(client.Local);
            }

            Random random = new(seed + i);
            await Misbehave(client, random);
        });

        List<LogLine> lines = await proxy.LinesOf("connection", Count, seconds: 30);
        Assert.Equal(addresses.Order(), lines.Select(l => l["client"]).Order());
        Assert.All(lines, l => Assert.Contains(l.End, new[] { "--", "CD", "SD", "cD", "sD", "SC" }));
        // each thread of the proxy may keep one pipe
        await Wait.Until(
            () => proxy.Descriptors <= descriptors + (2 * proxy.Threads),
            $"descriptors to be given back, seed {seed}");

        // no place was lost and none was won
        upstream.Dispose();
        Upstream calm = Given.Echo(upstream.Endpoint);
        Peer[] clients = await Task.WhenAll(Enumerable.Range(0, Limit).Select(_ => Given.Client(proxy)));
        await Task.WhenAll(clients.Select(c => c.Ask("hello")));
        await (await Given.Client(proxy)).ExpectEnd();
        Assert.Equal(Limit, calm.Accepted);
    }

    private static async Task Misbehave(Peer peer, Random random)
    {
        byte[] block = new byte[random.Next(1, 300_000)];
        try
        {
            for (int step = random.Next(6); step > 0; step--)
            {
                switch (random.Next(6))
                {
                    case 0:
                        await peer.SendSome(block);
                        break;
                    case 1:
                        await Briefly(peer.ReceiveSome(block), 20);
                        break;
                    case 2:
                        peer.Finish();
                        break;
                    case 3:
                        await Task.Delay(random.Next(20));
                        break;
                    case 4:
                        await Briefly(peer.Drain(), 50);
                        break;
                    default:
                        await peer.SendSome(block.AsMemory(0, 1));
                        break;
                }
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException or TimeoutException)
        {
            // the other end did something first
        }

        if (random.Next(2) == 0)
        {
            peer.Reset();
        }

        peer.Dispose();
    }

    private static Task<Task> Briefly(Task task, int milliseconds) =>
        Task.WhenAny(task, Task.Delay(milliseconds));
}
