using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.Text.RegularExpressions;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class TimeoutTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task A_silent_connection_is_reset_after_the_idle_timeout()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--idle-timeout", "1s");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        Stopwatch clock = Stopwatch.StartNew();
        await client.Exchange(server, "ping", "pong");
        await Task.WhenAll(client.ExpectReset(), server.ExpectReset());
        Assert.InRange(clock.ElapsedMilliseconds, 900, 4_000);
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("cD", "idle timeout", 4, 4), (line.End, line.Reason, line.BytesUp, line.BytesDown));
    }

    [Fact(Timeout = Slow)]
    public async Task What_came_while_the_process_stood_still_is_taken_before_anybody_is_late()
    {
        const int Count = 200;
        ProxyProcess proxy = await Given.Proxy("-l", "127.0.0.1:0", "-u", "echo", "--sni", "a.example", "-u", "discard",
            "--preread-timeout", "1s", "-v");
        List<Peer> clients = [];
        for (int i = 0; i < Count; i++)
        {
            clients.Add(await Given.Client(proxy));
        }

        await proxy.LinesOf("accepted", Count);
        proxy.Signal(ProxyProcess.SigStop);
        await Task.WhenAll(clients.ConvertAll(client => client.Send("no TLS\r\n")));
        await Wait.Pause(2_000);
        proxy.Signal(ProxyProcess.SigCont);
        await Task.WhenAll(clients.ConvertAll(client => client.ReceiveText("no TLS\r\n")));
    }

    [Fact(Timeout = Slow)]
    public async Task Who_is_late_is_late_even_where_the_process_stands_still_again_and_again()
    {
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", "echo", "--sni", "a.example", "-u", "discard", "--preread-timeout", "200ms");
        Peer client = await Given.Client(proxy);
        Task end = client.ExpectReset();
        Stopwatch clock = Stopwatch.StartNew();
        while (!end.IsCompleted && clock.ElapsedMilliseconds < 15_000)
        {
            proxy.Signal(ProxyProcess.SigStop); // as by cpulimit, or at the end of a small quota
            await Wait.Pause(100);
            proxy.Signal(ProxyProcess.SigCont);
            await Wait.Pause(2);
        }

        Assert.True(end.IsCompleted, "it was never late");
        await end;
    }

    [Theory(Timeout = Quick)]
    [InlineData("echo")]
    [InlineData("discard")]
    public async Task The_built_in_servers_have_an_idle_timeout_too(string server)
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", server, "--idle-timeout", "1s");
        Peer client = await Given.Client(proxy);
        await client.Send("hello");
        await client.ExpectReset();
        Assert.Equal(("cD", "idle timeout"), await EndOf(proxy, client));
    }

    [Theory(Timeout = Quick)]
    [InlineData(true)]
    [InlineData(false)]
    public async Task Traffic_in_one_direction_is_enough_to_stay(bool up)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--idle-timeout", "2s");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        (Peer from, Peer to) = up ? (client, server) : (server, client);
        for (int i = 0; i < 15; i++)
        {
            await from.Send(".");
            await to.ReceiveText(".");
            await Wait.Pause(300);
        }

        client.Finish();
        await server.ExpectEnd();
        server.Finish();
        await client.ExpectEnd();
        Assert.Equal("--", (await proxy.Connection(client)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task A_connection_with_traffic_ends_after_its_lifetime()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--max-lifetime", "2s");
        Stopwatch clock = Stopwatch.StartNew();
        Peer client = await Given.Client(proxy);
        System.Net.Sockets.SocketException? end = null;
        while (end is null && clock.ElapsedMilliseconds < 10_000)
        {
            try
            {
                await client.Ask("tick");
                await Wait.Pause(50);
            }
            catch (System.Net.Sockets.SocketException e)
            {
                end = e;
            }
        }

        Assert.NotNull(end);
        Assert.InRange(clock.ElapsedMilliseconds, 1_800, 5_000);
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("PD", "max lifetime"), (line.End, line.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task Keepalive_is_set_on_both_sides()
    {
        string ss = Tool.Need("ss", "iproute2");
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--keepalive", "50s");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Exchange(server, "ping", "pong");
        await CheckTimer($"sport = :{proxy.Port}");
        await CheckTimer($"dport = :{upstream.Port}");

        async Task CheckTimer(string filter)
        {
            // it need not be there from the first moment: most connections are gone before it matters
            Match timer = Match.Empty;
            for (int tries = 0; !timer.Success; tries++)
            {
                Assert.True(tries < 50, $"no keepalive timer: {filter}");
                await Wait.Pause(200);
                string text = (
                    await Tool.Run(ss, "-H", "-t", "-n", "-o", "state", "established", filter)).Good();
                timer = Regex.Match(text, @"timer:\(keepalive,(\d+)sec");
            }

            Assert.InRange(int.Parse(timer.Groups[1].Value, CultureInfo.InvariantCulture), 30, 50);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task The_built_in_servers_have_a_lifetime_too()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--max-lifetime", "1s");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        await client.ExpectReset();
        Assert.Equal(("PD", "max lifetime"), await EndOf(proxy, client));
    }

    [Fact(Timeout = Quick)]
    public async Task Keepalive_can_be_off()
    {
        string ss = Tool.Need("ss", "iproute2");
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--keepalive", "off");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Exchange(server, "ping", "pong");
        string text = (await Tool.Run(
            ss, "-H", "-t", "-n", "-o", "state", "established", $"sport = :{proxy.Port}")).Good();
        Assert.DoesNotContain("keepalive", text, StringComparison.Ordinal);
    }

    private static async Task<(string End, string Reason)> EndOf(ProxyProcess proxy, Peer client)
    {
        LogLine line = await proxy.Connection(client);
        return (line.End, line.Reason);
    }
}
