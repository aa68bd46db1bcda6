using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Net;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class ConnectTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task A_server_that_refuses_resets_the_client()
    {
        string address = $"127.0.0.1:{Given.RefusingPort()}";
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", address);
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("SC", "connection refused"), (line.End, line.Reason));
        Assert.Equal((-1, 0, 0), (line.Number("connect_ms"), line.BytesUp, line.BytesDown));
        Assert.Equal((address, "-"), (line["upstream"], line["server"]));
    }

    [Fact(Timeout = Quick)]
    public async Task A_server_that_cannot_be_reached_resets_the_client()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "127.255.255.255:9");
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("SC", "network unreachable"), (line.End, line.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task A_silent_server_resets_the_client_after_the_connect_timeout()
    {
        Upstream silent = await Given.Silent();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", silent.Address, "--connect-timeout", "1s", "--retries", "0");
        Stopwatch clock = Stopwatch.StartNew();
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        Assert.InRange(clock.ElapsedMilliseconds, 700, 5_000);
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("sC", "connect timeout", -1), (line.End, line.Reason, line.Number("connect_ms")));
    }

    [Fact(Timeout = Quick)]
    public async Task A_silent_server_is_passed_over_for_one_that_answers()
    {
        Upstream silent = await Given.Silent();
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", silent.Address, upstream.Address, "--connect-timeout", "500ms");
        proxy.Tolerate("server");
        for (int i = 0; i < 4; i++)
        {
            Peer client = await Given.Client(proxy);
            await client.Ask("hello");
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_name_that_does_not_exist_never_stops_the_start_and_resets_the_client()
    {
        Names names = await Names.Hosts(Given, "127.0.0.1 localhost");
        ProxyProcess proxy = await Given.Proxy(names.Launch, "127.0.0.1:0", "nosuch.example:80");
        proxy.Tolerate("resolve");
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("SC", "name not resolved"), (line.End, line.Reason));
        Assert.Equal(("nosuch.example:80", "-"), (line["upstream"], line["server"]));
    }

    [Fact(Timeout = Quick)]
    public async Task A_name_server_that_is_silent_is_bounded_by_the_connect_timeout()
    {
        Names names = await Names.SilentServer(Given, "127.0.0.1 localhost");
        ProxyProcess proxy = await Given.Proxy(
            names.Launch, "127.0.0.1:0", "slow.example:80", "--connect-timeout", "1s", "--retries", "0");
        proxy.Tolerate("resolve");
        Stopwatch clock = Stopwatch.StartNew();
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        Assert.InRange(clock.ElapsedMilliseconds, 700, 5_000);
        Assert.True(names.Asked > 0, "the name server was not asked");
        Assert.Contains("C", (await proxy.Connection(client)).End, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task Names_that_take_for_ever_hold_up_nobody_else()
    {
        Names names = await Names.SilentServer(Given, "127.0.0.1 localhost");
        Upstream upstream = Given.Echo();
        List<string> words = ["--connect-timeout", "10s", "-l", "127.0.0.1:0", "-u", upstream.Address];
        for (int i = 0; i < 40; i++)
        {
            words.AddRange(["-l", "127.0.0.1:0", "-u", $"slow{i}.example:80"]);
        }

        ProxyProcess proxy = await Given.Proxy(names.Launch, [.. words]);
        proxy.Tolerate("resolve");
        for (int i = 1; i <= 40; i++)
        {
            await (await Given.Client(proxy, i)).Send("waiting");
        }

        await Wait.Until(() => names.Asked > 0, "a question to the name server");
        Stopwatch clock = Stopwatch.StartNew();
        for (int i = 0; i < 50; i++)
        {
            Peer client = await Given.Client(proxy);
            await client.Ask("hello");
            client.Dispose();
        }

        Assert.True(clock.ElapsedMilliseconds < 3_000, $"50 connections took {clock.ElapsedMilliseconds} ms");
    }

    [Theory(Timeout = Quick)]
    [InlineData("127.0.0.1", "")]
    [InlineData("::1", "")]
    [InlineData("127.0.0.1", " max-connections=5")] // then they are dialled one after the other
    [InlineData("::1", " max-connections=5")]
    public async Task Of_two_addresses_of_a_name_the_one_that_listens_is_found(string listening, string bound)
    {
        Names names = await Names.Hosts(
            Given, "127.0.0.1 localhost two.example", "::1 localhost two.example");
        int port = Given.FreePorts(1); // at both addresses: at the other one another test may else have a server
        Upstream upstream = Given.Echo(new IPEndPoint(IPAddress.Parse(listening), port));
        ProxyProcess proxy = await Given.Proxy(
            names.Launch, "127.0.0.1:0", $"two.example:{upstream.Port}{bound}", "--retries", "0");
        proxy.Tolerate("resolve");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(upstream.Address, line["server"]);
        Assert.Equal($"two.example:{upstream.Port}", line["upstream"]);
    }

    [Theory(Timeout = Quick)]
    [InlineData("127.0.0.1", "::1")]
    [InlineData("::1", "127.0.0.1")]
    public async Task A_silent_address_of_a_name_costs_less_than_the_connect_timeout(
        string silent, string listening)
    {
        Names names = await Names.Hosts(
            Given, "127.0.0.1 localhost two.example", "::1 localhost two.example");
        Upstream dead = await Given.Silent(IPAddress.Parse(silent), Given.FreePorts(1));
        Upstream upstream = Given.Echo(new IPEndPoint(IPAddress.Parse(listening), dead.Port));
        ProxyProcess proxy = await Given.Proxy(names.Launch, "127.0.0.1:0", $"two.example:{upstream.Port}");
        proxy.Tolerate("resolve");
        Stopwatch clock = Stopwatch.StartNew();
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        Assert.True(clock.ElapsedMilliseconds < 2_500, $"connected after {clock.ElapsedMilliseconds} ms");
    }

    [Fact(Timeout = Quick)]
    public async Task An_address_that_keeps_silent_while_another_answers_is_taken_for_down()
    {
        Names names = await Names.Hosts(Given, "127.0.0.1 localhost", "127.0.0.2 two.example", "127.0.0.3 two.example");
        Upstream silent = await Given.Silent(IPAddress.Parse("127.0.0.2"));
        Upstream upstream = Given.Echo(new IPEndPoint(IPAddress.Parse("127.0.0.3"), silent.Port));
        ProxyProcess proxy = await Given.Proxy(
            names.Launch, "127.0.0.1:0", $"two.example:{upstream.Port}", "--balance", "first", "--max-fails", "2");
        proxy.Tolerate("server");
        for (int i = 0; i < 4; i++)
        {
            Peer client = await Given.Client(proxy);
            await client.Ask("hello");
            client.Finish();
            await client.ExpectEnd();
            LogLine line = await proxy.Connection(client);
            Assert.Equal(upstream.Address, line["server"]);
            bool isRaced = i < 2; // the silent one is tried first, and has its quarter of a second
            Assert.Equal(isRaced, line.Number("connect_ms") >= 240);
            if (i == 1)
            {
                LogLine down = await proxy.Line("server", one => one["state"] == "down");
                Assert.Contains("no answer while another address gave one", down["reason"], StringComparison.Ordinal);
            }
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_port_alone_is_localhost()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", $"{upstream.Port}");
        await (await Given.Client(proxy)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task A_server_that_comes_later_is_served_from_then_on()
    {
        int port = Given.RefusingPort();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", $"127.0.0.2:{port}");
        await (await Given.Client(proxy)).ExpectReset();
        Given.Echo(new IPEndPoint(IPAddress.Parse("127.0.0.2"), port));
        await (await Given.Client(proxy)).Ask("hello");
    }
}
