using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

[Collection("heavy")]
public sealed class ManyConnectionsTests : EndToEndTest
{
    [Fact(Timeout = Slow)]
    public async Task Five_thousand_connections_are_open_at_once_and_all_are_served()
    {
        const int Count = 5_000;
        NeedDescriptors(Count * 2 + 200);
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        int descriptors = proxy.Descriptors;
        long idle = proxy.Resident;

        Peer[] clients = new Peer[Count];
        await Wait.Many(Count, 64, async i =>
            clients[i] = await Given.Client(proxy));
        await Wait.Until(() => upstream.Accepted == Count, "all connections at the server", 60);
        long open = proxy.Resident;

        foreach (string round in new[] { "first", "second" })
        {
            await Task.WhenAll(clients.Select((c, i) => c.Ask($"{round} question of {i}")));
        }

        await Wait.Many(Count, 64, async i =>
        {
            clients[i].Finish();
            await clients[i].ExpectEnd();
            clients[i].Dispose();
        });
        List<LogLine> lines = await proxy.LinesOf("connection", Count, seconds: 60);
        Assert.Equal(Count, lines.Count);
        Assert.All(lines, l => Assert.Equal("--", l.End));
        await Wait.Until(() => proxy.Descriptors <= descriptors + 5, "the descriptors to be given back");
        long each = (open - idle) / Count;
        TestContext.Current.TestOutputHelper?.WriteLine($"{each} bytes resident for an idle connection");
        Assert.True(each < 20_000, $"{each} bytes resident for an idle connection");
    }

    [Fact(Timeout = Slow)]
    public async Task Twenty_thousand_connections_one_after_the_other_leave_nothing_behind()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "-q");
        await OpenAndClose(5_000);
        await Wait.Until(() => proxy.Descriptors < (Tool.IsPortable ? 80 : 40), "the descriptors to be given back");
        int descriptors = proxy.Descriptors;
        int threads = proxy.Threads;
        long memory = proxy.Resident;

        await OpenAndClose(15_000);
        await Wait.Until(() => proxy.Descriptors <= descriptors + 2 + Tool.LateFiles, "the descriptors to be given back");
        Assert.True(proxy.Threads <= threads + 4, $"from {threads} threads to {proxy.Threads}");
        long most = Tool.IsPortable ? 16 << 20 : 4 << 20; // what is compiled as it runs goes on being compiled
        Assert.True(proxy.Resident - memory < most, $"resident memory went from {memory} to {proxy.Resident}");

        // half of the clients finish in order, half reset: neither may leave anything
        Task OpenAndClose(int count) =>
            Wait.Many(count, 32, async i =>
            {
                using Peer client = await Peer.Connect(proxy.Endpoint());
                await client.Ask("hello");
                if (i % 2 == 0)
                {
                    client.Reset();
                    return;
                }

                client.Finish();
                await client.ExpectEnd();
            });
    }

    [Fact(Timeout = Slow)]
    public async Task Connections_that_wait_cost_no_processor_time()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        for (int i = 0; i < 100; i++)
        {
            (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
            await client.Exchange(server, "ping", "pong");
            if (i % 3 == 0)
            {
                client.Finish();
                await server.ExpectEnd();
            }
            else if (i % 3 == 1)
            {
                server.Finish();
                await client.ExpectEnd();
            }
        }

        double before = proxy.Processor;
        await Wait.Pause(3_000);
        Assert.InRange(proxy.Processor - before, 0, 90);
    }

    private static void NeedDescriptors(int count)
    {
        string[] words = File.ReadLines("/proc/self/limits")
            .First(l => l.StartsWith("Max open files", StringComparison.Ordinal))
            .Split(' ', StringSplitOptions.RemoveEmptyEntries);
        bool enough = words[3] == "unlimited"
            || int.Parse(words[3], System.Globalization.CultureInfo.InvariantCulture) >= count;
        Assert.SkipUnless(enough, $"wants {count} descriptors, {words[3]} are allowed: ulimit -n {count}");
    }
}
