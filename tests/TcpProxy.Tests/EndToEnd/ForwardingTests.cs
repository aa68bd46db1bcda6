using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Http;
using System.Net.Sockets;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class ForwardingTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task Bytes_pass_both_ways_and_the_log_counts_them()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);

        await client.Send("hello");
        await server.ReceiveText("hello");
        await server.Send("good day");
        await client.ReceiveText("good day");
        client.Finish();
        await server.ExpectEnd();
        server.Finish();
        await client.ExpectEnd();

        LogLine line = await proxy.Connection(client);
        Assert.Equal((5, 8, "--", "done"), (line.BytesUp, line.BytesDown, line.End, line.Reason));
        Assert.Equal(upstream.Address, line["server"]);
    }

    [Theory(Timeout = Quick)]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(4095)]
    [InlineData(65536)]
    [InlineData(65537)]
    [InlineData(10_000_000)]
    public async Task What_is_sent_right_before_the_end_arrives_whole(int length)
    {
        Pattern pattern = new(length);
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);

        Task sending = Wait.Apart(async () =>
        {
            await client.Send(pattern, length);
            client.Finish();
        });
        await server.Receive(pattern, length);
        await server.ExpectEnd();
        await sending;
        sending = Wait.Apart(async () =>
        {
            await server.Send(pattern, length, offset: 7);
            server.Dispose();
        });
        await client.Receive(pattern, length, offset: 7);
        await client.ExpectEnd();
        await sending;

        LogLine line = await proxy.Connection(client);
        Assert.Equal((length, length, "--"), (line.BytesUp, line.BytesDown, line.End));
    }

    [Fact(Timeout = Quick)]
    public async Task A_server_that_speaks_first_and_leaves_is_heard()
    {
        Upstream upstream = Given.Server(async peer =>
        {
            await peer.Send("220 ready\r\n");
            peer.Dispose();
        });
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        Peer client = await Given.Client(proxy);
        Assert.Equal("220 ready\r\n", Encoding.ASCII.GetString(await client.ReceiveToEnd()));
        client.Finish();
        Assert.Equal("--", (await proxy.Connection(client)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task A_client_that_sends_and_finishes_before_the_server_is_connected_loses_nothing()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        for (int i = 0; i < 200; i++)
        {
            Task<Peer> accepted = upstream.Accept();
            Peer client = await Given.Client(proxy);
            await client.Send("early");
            client.Finish();
            Peer server = await accepted;
            Assert.Equal("early", Encoding.ASCII.GetString(await server.ReceiveToEnd()));
            await server.Send("late");
            server.Dispose();
            Assert.Equal("late", Encoding.ASCII.GetString(await client.ReceiveToEnd()));
            client.Dispose();
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Small_messages_are_not_held_back()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        Peer client = await Given.Client(proxy);
        client.Socket.NoDelay = true;
        await client.Ask("warm");
        Stopwatch clock = Stopwatch.StartNew();
        for (int i = 0; i < 100; i++)
        {
            // two small writes before an answer: Nagle and a delayed ACK would cost 40 ms each time
            await client.Send("a");
            await client.Send("b");
            await client.ReceiveText("ab");
        }

        Assert.True(clock.ElapsedMilliseconds < 3500, $"100 round trips took {clock.ElapsedMilliseconds} ms");
    }

    [Theory(Timeout = Quick)]
    [InlineData("4k")]
    [InlineData("16k")]
    [InlineData("1m")]
    public async Task Any_buffer_size_moves_the_same_bytes(string size)
    {
        const int Length = 20_000_000;
        Pattern pattern = new(3);
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--buffer-size", size);
        Peer client = await Given.Client(proxy);
        Task sending = client.Send(pattern, Length);
        await client.Receive(pattern, Length);
        await sending;
    }

    [Theory(Timeout = Quick)]
    [InlineData("1")]
    [InlineData("4")]
    public async Task Any_number_of_threads_serves(string threads)
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--threads", threads);
        Peer[] clients = await Task.WhenAll(Enumerable.Range(0, 50).Select(_ => Given.Client(proxy)));
        await Task.WhenAll(clients.Select((c, i) => c.Ask($"client {i}")));
    }

    [Fact(Timeout = Quick)]
    public async Task The_original_command_line_serves_a_browser_like_client()
    {
        Upstream web = Given.Server(Web.Serve);
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1", "0", "127.0.0.1", $"{web.Port}");
        using SocketsHttpHandler handler = new() { MaxConnectionsPerServer = 6, UseProxy = false };
        using HttpClient browser = new(handler) { BaseAddress = new Uri($"http://127.0.0.1:{proxy.Port}/") };

        string page = await browser.GetStringAsync(Page(100), TestContext.Current.CancellationToken);
        Assert.Equal(Web.Body(100), page);
        int[] sizes = [.. Enumerable.Range(0, 300).Select(i => (i * 7919) % 200_000)];
        string[] bodies = await Task.WhenAll(sizes.Select(
            s => browser.GetStringAsync(Page(s), TestContext.Current.CancellationToken)));
        Assert.All(sizes.Zip(bodies), pair => Assert.True(
            Web.Body(pair.First) == pair.Second, $"the page of {pair.First} bytes differs"));
        Assert.InRange(web.Accepted, 1, 12);

        static Uri Page(int length) => new($"page/{length}", UriKind.Relative);
    }

    [Fact(Timeout = Quick)]
    public async Task Several_upstreams_a_refused_one_is_passed_over_and_no_client_notices()
    {
        Upstream upstream = Given.Echo();
        string dead = $"127.0.0.1:{Given.RefusingPort()}";
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", dead, upstream.Address);
        proxy.Tolerate("server");
        for (int i = 0; i < 20; i++)
        {
            Peer client = await Given.Client(proxy);
            await client.Ask($"message {i}");
            client.Finish();
            await client.ExpectEnd();
            LogLine line = await proxy.Connection(client);
            Assert.Equal((upstream.Address, "--"), (line["server"], line.End));
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Several_upstreams_without_retries_a_refused_one_is_felt()
    {
        Upstream upstream = Given.Echo();
        string dead = $"127.0.0.1:{Given.RefusingPort()}";
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", dead, dead, "--retries", "0");
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        Assert.Equal("SC", (await proxy.Connection(client)).End);
        Assert.Equal(0, upstream.Accepted);
    }

    [Fact(Timeout = Quick)]
    public async Task Several_upstreams_share_the_connections()
    {
        Upstream first = Given.Named("first");
        Upstream second = Given.Named("second");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", first.Address, second.Address);
        List<string> served = [];
        for (int i = 0; i < 20; i++)
        {
            served.Add(await (await Given.Client(proxy)).ReceiveLine());
        }

        Assert.Equal(10, served.Count(s => s == "first"));
        Assert.Equal(10, served.Count(s => s == "second"));
    }

    [Fact(Timeout = Quick)]
    public async Task The_source_address_is_used_towards_the_server()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--source", "127.0.0.99");
        (_, Peer server) = await Given.Bridge(proxy, upstream);
        Assert.Equal(IPAddress.Parse("127.0.0.99"), ((IPEndPoint)server.Socket.RemoteEndPoint!).Address);
    }
}

/// <summary>A web server of a few lines: GET /page/N answers N bytes, and the connection is kept.</summary>
internal static class Web
{
    public static string Body(int length) => string.Create(
        length, length, (span, seed) =>
        {
            for (int i = 0; i < span.Length; i++)
            {
                span[i] = (char)('a' + ((i + seed) % 26));
            }
        });

    public static async Task Serve(Peer peer)
    {
        using NetworkStream stream = new(peer.Socket, ownsSocket: true);
        using StreamReader reader = new(stream, Encoding.ASCII);
        while (await reader.ReadLineAsync() is { } request)
        {
            while (!string.IsNullOrEmpty(await reader.ReadLineAsync()))
            {
                // headers do not matter here
            }

            string size = request.Split(' ')[1].Split('/')[^1];
            int length = int.Parse(size, CultureInfo.InvariantCulture);
            string head = $"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nContent-Type: text/plain\r\n\r\n";
            await stream.WriteAsync(Encoding.ASCII.GetBytes(head + Body(length)));
        }
    }
}
