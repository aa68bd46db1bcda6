using System.Globalization;
using System.Linq;
using System.Text.RegularExpressions;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

[Collection("heavy")]
public sealed class StalledLogTests : EndToEndTest
{
    [Fact(Timeout = Slow)]
    public async Task A_log_that_nobody_reads_holds_up_nobody_and_what_it_lost_is_counted()
    {
        const int Count = 12_000;
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(
            new Launch { ReadLog = false }, "127.0.0.1:0", upstream.Address, "-v");
        await Wait.Many(Count, 32, async i =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            await client.Ask("hello");
            client.Finish();
            await client.ExpectEnd();
        });
        Assert.True(proxy.Resident < 64 << 20, $"{proxy.Resident} bytes resident");

        proxy.StartReading();
        LogLine dropped = await proxy.Line("log");
        proxy.Tolerate("log");
        Match count = Regex.Match(dropped["message"], @"^(\d+) lines dropped");
        Assert.True(count.Success, dropped.Raw);

        Peer last = await Given.Client(proxy);
        await last.Ask("logged again");
        last.Finish();
        await last.ExpectEnd();
        await proxy.Connection(last);
        Assert.Equal(0, await proxy.Stop());
        int lost = int.Parse(count.Groups[1].Value, CultureInfo.InvariantCulture);
        Assert.Equal(2 * (Count + 1), proxy.Lines.Count(l => l.Event is "accepted" or "connection") + lost);
    }

    [Fact(Timeout = Quick)]
    public async Task A_stderr_that_somebody_made_non_blocking_gets_whole_lines()
    {
        Tool.NeedLibc("there is no poll(2) to wait with");
        const int Count = 2_000;
        string python = Tool.Need("python3", "python3");
        const string Script = """
            import os, sys
            os.set_blocking(2, False)
            os.execv(sys.argv[1], sys.argv[1:])
            """;
        Launch launch = new() { Before = [python, "-c", Script], ReadLog = false };
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", "echo");
        await Wait.Many(Count, 32, async i =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            await client.Ask("hello");
            client.Finish();
            await client.ExpectEnd();
        });
        proxy.StartReading(); // more than a pipe holds was written before
        await Wait.Until(() => proxy.Lines.Count(l => l.Event == "connection") == Count, "a line a connection");
        Assert.Equal(0, await proxy.Stop());
    }

    [Fact(Timeout = Quick)]
    public async Task A_log_that_nobody_reads_does_not_hold_up_the_end()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(
            new Launch { ReadLog = false, MayBreakOff = true }, "127.0.0.1:0", upstream.Address);
        await Wait.Many(1_500, 32, async i =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            await client.Ask("hello");
        });
        proxy.Signal(ProxyProcess.SigTerm);
        await Wait.Until(() => proxy.HasExited, "the end of a proxy whose log nobody reads", 15);
    }
}
