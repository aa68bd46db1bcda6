using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.Linq;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>A minute of churn (TCPPROXY_SOAK_SECONDS for another length): what was taken is given back.</summary>
[Collection("heavy")]
public sealed class SoakTests : EndToEndTest
{
    private const int Workers = 24;
    private const long Slack = 8 << 20; // bytes: buffers that the pool keeps, and the garbage of a moment

    [Fact(Timeout = 3_700_000)]
    public async Task After_a_minute_of_churn_nothing_is_left_and_memory_is_flat()
    {
        double seconds = double.Parse(
            Environment.GetEnvironmentVariable("TCPPROXY_SOAK_SECONDS") ?? "60", CultureInfo.InvariantCulture);
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "-q");
        int descriptors = proxy.Descriptors;
        Stopwatch clock = Stopwatch.StartNew();
        List<long> resident = [];
        long served = 0;
        Task watching = Wait.Apart(async () =>
        {
            while (clock.Elapsed.TotalSeconds < seconds)
            {
                await Wait.Pause((int)(seconds * 1000 / 30));
                resident.Add(proxy.Resident);
            }
        });
        await Wait.Many(Workers, Workers, async worker =>
        {
            Random random = new(worker);
            while (clock.Elapsed.TotalSeconds < seconds)
            {
                await Converse(proxy, random);
                Interlocked.Increment(ref served);
            }
        });
        await watching;

        // each thread of the proxy may keep one pipe
        await Wait.Until(() => proxy.Descriptors <= descriptors + (2 * proxy.Threads), "descriptors to be given back");
        int third = resident.Count / 3;
        long early = resident.Skip(third / 2).Take(third).Max();
        long late = resident.TakeLast(third).Max();
        TestContext.Current.TestOutputHelper?.WriteLine(
            $"{served} connections, resident {early >> 10} KB early, {late >> 10} KB late");
        Assert.True(served > Workers, $"{served} connections in {seconds} s");
        Assert.True(late <= early + Slack, $"resident {early} bytes early, {late} bytes late");
    }

    /// <summary>One connection of a random kind.</summary>
    private static async Task Converse(ProxyProcess proxy, Random random)
    {
        using Peer client = await Peer.Connect(proxy.Endpoint());
        switch (random.Next(10))
        {
            case 0: // a stream, which is spliced, both ways at once
                Pattern pattern = new(random.Next());
                int length = random.Next(1, 8 << 20);
                await Task.WhenAll(client.Send(pattern, length), client.Receive(pattern, length));
                break;
            case 1: // cut in the middle of a stream
                await client.SendSome(new byte[1 << 20]);
                client.Reset();
                return;
            case 2: // a client that only looks
                break;
            default:
                await client.Ask("hello");
                await client.Ask("once more");
                break;
        }

        client.Finish();
        await client.ExpectEnd();
    }
}
