using System;
using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class OnceAndWaitForTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task Once_serves_one_connection_and_ends_well()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--once");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        Assert.Equal(0, await proxy.Exit(5));
        Assert.Equal("--", (await proxy.Connection(client)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task Once_takes_no_second_connection()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--once");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Exchange(server, "ping", "pong");
        try
        {
            // who waits at the listener while it closes is reset, who comes before that is taken and closed
            (byte[] data, SocketError error) = await (await Given.Client(proxy)).Drain();
            Assert.Empty(data);
            Assert.Contains(error, new[] { SocketError.Success, SocketError.ConnectionReset });
        }
        catch (SocketException e)
        {
            Assert.Contains(e.SocketErrorCode, new[] { SocketError.ConnectionRefused, SocketError.ConnectionReset });
        }

        await client.Exchange(server, "ping", "pong");
        Assert.Equal(1, upstream.Accepted);
        client.Dispose();
        server.Dispose();
        Assert.Equal(0, await proxy.Exit(5));
    }

    [Fact(Timeout = Quick)]
    public async Task Once_with_a_server_that_refuses_ends_badly()
    {
        ProxyProcess proxy = await Given.Proxy(
            new Launch { ExpectedExit = 1 }, "127.0.0.1:0", $"127.0.0.1:{Given.RefusingPort()}", "--once");
        await (await Given.Client(proxy)).ExpectReset();
        Assert.Equal(1, await proxy.Exit(5));
    }

    [Fact(Timeout = Quick)]
    public async Task Once_with_a_reset_ends_badly()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            new Launch { ExpectedExit = 1 }, "127.0.0.1:0", upstream.Address, "--once");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Exchange(server, "ping", "pong");
        server.Reset();
        await client.ExpectReset();
        Assert.Equal(1, await proxy.Exit(5));
    }

    [Fact(Timeout = Quick)]
    public async Task Wait_for_succeeds_at_once_when_the_server_is_there()
    {
        Upstream upstream = Given.Server();
        Stopwatch clock = Stopwatch.StartNew();
        Outcome outcome = await Tool.Proxy("--wait-for", upstream.Address);
        Assert.Equal((0, string.Empty), (outcome.Status, outcome.Err));
        Assert.True(clock.ElapsedMilliseconds < 2_000, $"took {clock.ElapsedMilliseconds} ms");
    }

    [Fact(Timeout = Quick)]
    public async Task Wait_for_succeeds_when_the_server_comes_later()
    {
        using Socket socket = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        socket.Bind(new IPEndPoint(IPAddress.Loopback, 0));
        Task<Outcome> waiting = Tool.Proxy(
            "--wait-for", socket.LocalEndPoint!.ToString()!, "--timeout", "20s");
        await Wait.Pause(1_000);
        Assert.False(waiting.IsCompleted);
        socket.Listen();
        Stopwatch clock = Stopwatch.StartNew();
        Assert.Equal(0, (await waiting).Status);
        Assert.True(clock.ElapsedMilliseconds < 2_500, $"took {clock.ElapsedMilliseconds} ms to notice");
    }

    [Fact(Timeout = Quick)]
    public async Task Wait_for_gives_up_after_its_timeout()
    {
        string address = $"127.0.0.1:{Given.RefusingPort()}";
        Stopwatch clock = Stopwatch.StartNew();
        Outcome outcome = await Tool.Proxy("--wait-for", address, "--timeout", "1s");
        Assert.Equal(1, outcome.Status);
        Assert.InRange(clock.ElapsedMilliseconds, 800, 4_000);
        string line = Assert.Single(outcome.ErrLines);
        Assert.StartsWith("tcpproxy: error: ", line, StringComparison.Ordinal);
        Assert.Contains(address, line, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task Wait_for_gives_up_on_a_silent_server_in_time()
    {
        Upstream silent = await Given.Silent();
        Stopwatch clock = Stopwatch.StartNew();
        Outcome outcome = await Tool.Proxy("--wait-for", silent.Address, "--timeout", "1s");
        Assert.Equal(1, outcome.Status);
        Assert.InRange(clock.ElapsedMilliseconds, 800, 4_000);
    }

    [Fact(Timeout = Quick)]
    public async Task Once_without_a_client_has_failed()
    {
        ProxyProcess proxy = await Given.Proxy(new Launch { ExpectedExit = 1 }, "127.0.0.1:0", "echo", "--once");
        Assert.Equal(1, await proxy.Stop());
    }
}
