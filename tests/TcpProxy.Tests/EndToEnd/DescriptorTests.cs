using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

[Collection("heavy")]
public sealed class DescriptorTests : EndToEndTest
{
    [Fact(Timeout = Slow)]
    public async Task Out_of_descriptors_the_listener_survives_says_so_once_and_recovers()
    {
        Tool.NeedLibc("the files of the runtime take the descriptors");
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(Launch.WithDescriptors(64), "127.0.0.1:0", upstream.Address);
        proxy.Tolerate("exhausted", "recovered");

        for (int round = 1; round <= 2; round++)
        {
            Peer[] clients = await Task.WhenAll(Enumerable.Range(0, 200).Select(_ => Given.Client(proxy)));
            bool[] served = await Task.WhenAll(clients.Select(Served));
            int refused = served.Count(s => !s);
            Assert.InRange(200 - refused, 5, 60);
            await Task.WhenAll(clients.Where((_, i) => served[i]).Select(c => c.Ask("still there")));
            await proxy.LinesOf("exhausted", round);
            double before = proxy.Processor;
            await Wait.Pause(1_000);
            Assert.InRange(proxy.Processor - before, 0, 300);
            Array.ForEach(clients, c => c.Dispose());

            await Wait.Until(() => proxy.Descriptors < 50, "the descriptors to be given back");
            for (int i = 0; i < 10; i++)
            {
                Peer client = await Given.Client(proxy);
                await client.Ask("all works again");
                client.Dispose();
            }

            // it is over when for a while nobody was refused and somebody was accepted
            while (proxy.Lines.Count(l => l.Event == "recovered") < round)
            {
                await Wait.Pause(200);
                (await Given.Client(proxy)).Dispose();
            }

            List<LogLine> recovered = await proxy.LinesOf("recovered", round);
            Assert.Equal(refused, recovered[^1].Number("refused"));
            Assert.Equal(round, proxy.Lines.Count(l => l.Event == "exhausted"));
            Assert.Equal("warn", proxy.Lines.First(l => l.Event == "exhausted").Level);
            Assert.True(proxy.Lines.Count(l => l.Event != "connection") < 20, "the log is flooded");
        }

        // served: an answer comes; refused: the connection ends soon, in whatever way
        static async Task<bool> Served(Peer peer)
        {
            try
            {
                await peer.Ask("hello");
                return true;
            }
            catch (Exception e) when (e is SocketException or Xunit.Sdk.XunitException)
            {
                return false;
            }
        }
    }

    [Fact(Timeout = Slow)]
    public async Task The_soft_limit_is_raised_to_the_hard_one()
    {
        Upstream upstream = Given.Echo();
        Launch low = Launch.FromShell("ulimit -S -n 64");
        ProxyProcess proxy = await Given.Proxy(low, "127.0.0.1:0", upstream.Address);
        string limits = File.ReadLines($"/proc/{proxy.Id}/limits").First(
            l => l.StartsWith("Max open files", StringComparison.Ordinal));
        string[] words = limits.Split(' ', StringSplitOptions.RemoveEmptyEntries);
        Assert.Equal(words[4], words[3]);
        Peer[] clients = await Task.WhenAll(Enumerable.Range(0, 200).Select(_ => Given.Client(proxy)));
        await Task.WhenAll(clients.Select(c => c.Ask("hello")));
    }
}
