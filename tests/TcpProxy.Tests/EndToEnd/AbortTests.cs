using System;
using System.Collections.Generic;
using System.Linq;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class AbortTests : EndToEndTest
{
    [Theory(Timeout = Quick)]
    [InlineData(false)]
    [InlineData(true)]
    public async Task A_reset_of_the_client_reaches_the_server_as_a_reset(bool afterData)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        string address = client.Local;
        if (afterData)
        {
            await client.Send("hello");
            await server.ReceiveText("hello");
            await server.Send("hello");
            await client.ReceiveText("hello");
        }

        client.Reset();
        await server.ExpectReset();
        LogLine line = await proxy.Connection(address);
        Assert.Equal(("CD", "client reset"), (line.End, line.Reason));
    }

    [Theory(Timeout = Quick)]
    [InlineData(false)]
    [InlineData(true)]
    public async Task A_reset_of_the_server_reaches_the_client_as_a_reset(bool afterAnswer)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Send("hello");
        await server.ReceiveText("hello"); // before that the proxy may still be connecting: SC, not SD
        if (afterAnswer)
        {
            await server.Send("hello");
            await client.ReceiveText("hello");
        }

        server.Reset();
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("SD", "upstream reset"), (line.End, line.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task Urgent_data_is_data_and_no_reset()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        Pattern pattern = new(1);
        const int Length = 64 << 20; // more than all buffers on the way: the proxy has to wait for the client
        Task sending = Wait.Apart(async () =>
        {
            await server.Send(pattern, Length);
            await server.Socket.SendAsync(new byte[] { (byte)'!' }, System.Net.Sockets.SocketFlags.OutOfBand);
            await server.Send("after");
            server.Finish();
        });
        await Wait.Pause(3_000); // long enough for the proxy to look after a bridge that makes no progress
        await client.Receive(pattern, Length);
        await client.ReceiveText("!after");
        await sending;
        client.Finish();
        await client.ExpectEnd();
        Assert.Equal("--", (await proxy.Connection(client)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task A_reset_after_the_own_end_is_passed_on_as_well()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        client.Finish();
        await server.ExpectEnd();
        server.Reset();
        await client.ExpectReset();
        Assert.Equal("SD", (await proxy.Connection(client)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task A_client_that_finishes_and_then_goes_away_does_not_leave_the_server_waiting()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        string address = client.Local;
        client.Finish();
        await server.ExpectEnd();
        client.Reset();
        await server.ExpectBroken();
        Assert.Equal("CD", (await proxy.Connection(address)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task A_client_that_closes_without_reading_the_answer_resets_the_server()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        string address = client.Local;
        await client.Exchange(server, "ping", "pong");
        await server.Send("unread");
        await Wait.Until(() => client.Socket.Available == 6, "the unread answer");
        client.Dispose();
        await server.ExpectReset();
        Assert.Equal("CD", (await proxy.Connection(address)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task A_reset_while_both_sides_are_stuck_ends_the_connection()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        string address = client.Local;
        Task<SocketError> up = Flood(client);
        Task<SocketError> down = Flood(server);
        await Task.WhenAll(Stuck(client), Stuck(server));
        client.Reset();

        // the one who asks first is told of the reset, here the sender
        Assert.Equal(SocketError.ConnectionReset, await down.Within("the end of the server's sender"));
        await up.Within("the end of the client's sender");
        Assert.Equal("CD", (await proxy.Connection(address)).End);

        static async Task<SocketError> Flood(Peer peer)
        {
            byte[] block = new byte[256 * 1024];
            try
            {
                while (true)
                {
                    await peer.Socket.SendAsync(block.AsMemory());
                }
            }
            catch (ObjectDisposedException)
            {
                return SocketError.OperationAborted;
            }
            catch (SocketException e)
            {
                return e.SocketErrorCode;
            }
        }

        // a sender is stuck when its queue does not take more for a while
        static async Task Stuck(Peer peer)
        {
            for (int quiet = 0; quiet < 10;)
            {
                bool writable = peer.Socket.Poll(0, SelectMode.SelectWrite);
                quiet = writable ? 0 : quiet + 1;
                await Wait.Pause(50);
            }
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Clients_that_leave_at_once_are_no_error()
    {
        const int Count = 500;
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        int before = proxy.Descriptors;
        await Wait.Many(Count, 16, async i =>
        {
            Peer client = await Peer.Connect(proxy.Endpoint());
            if (i % 2 == 0)
            {
                client.Reset();
            }

            client.Dispose();
        });
        List<LogLine> lines = await proxy.LinesOf("connection", Count);
        Assert.All(lines, l => Assert.StartsWith("127.0.0.1:", l["client"], StringComparison.Ordinal));
        Assert.All(lines, l => Assert.Contains(l.End, new[] { "--", "CD", "SD", "SC" }));
        await Wait.Until(() => proxy.Descriptors <= before + 2 + Tool.LateFiles, "the descriptors to be given back");
    }

    [Fact(Timeout = Quick)]
    public async Task Clients_that_leave_while_the_server_is_being_connected_leave_nothing_behind()
    {
        Upstream silent = await Given.Silent();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", silent.Address, "--connect-timeout", "3s", "--retries", "0");
        int before = proxy.Descriptors;
        List<string> addresses = [];
        for (int i = 0; i < 20; i++)
        {
            Peer client = await Given.Client(proxy);
            addresses.Add(client.Local);
            await client.Send("anybody there?");
            client.Reset();
        }

        List<LogLine> lines = await proxy.LinesOf("connection", 20);
        Assert.Equal(addresses.Order(), lines.Select(l => l["client"]).Order());
        await Wait.Until(() => proxy.Descriptors <= before + 2 + Tool.LateFiles, "the descriptors to be given back");
    }
}

internal static class Conversation
{
    /// <summary>A question from one end of the bridge and the answer from the other.</summary>
    public static async Task Exchange(this Peer client, Peer server, string question, string answer)
    {
        await client.Send(question);
        await server.ReceiveText(question);
        await server.Send(answer);
        await client.ReceiveText(answer);
    }
}
