using System;
using System.Diagnostics;
using System.IO;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class ShutdownTests : EndToEndTest
{
    [Theory(Timeout = Quick)]
    [InlineData(ProxyProcess.SigTerm)]
    [InlineData(ProxyProcess.SigInt)]
    public async Task Running_transfers_complete_while_new_connections_are_refused(int signal)
    {
        const int Half = 20_000_000;
        Pattern pattern = new(signal);
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await Task.WhenAll(server.Send(pattern, Half), client.Receive(pattern, Half));

        proxy.Signal(signal);
        Assert.Equal(1, (await proxy.Line("draining")).Number("connections"));
        proxy.Signal(ProxyProcess.SigUsr2);
        Assert.Matches("^running for .*, 1 connection, .*, draining$", (await proxy.Line("state"))["message"]);
        await Wait.Until(Refuses, "new connections to be refused", 5);

        await Task.WhenAll(server.Send(pattern, Half, Half), client.Receive(pattern, Half, Half));
        await client.Exchange(server, "still", "working");
        Assert.False(proxy.HasExited);
        client.Finish();
        await server.ExpectEnd();
        server.Finish();
        await client.ExpectEnd();

        Assert.Equal(0, await proxy.Exit(5));
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("--", (2L * Half) + 7), (line.End, line.BytesDown));
        Assert.Equal("stopped", proxy.Lines[^1].Event);

        bool Refuses()
        {
            using Socket probe = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
            try
            {
                probe.Connect(proxy.Endpoint());
                return false;
            }
            catch (SocketException e)
            {
                return e.SocketErrorCode == SocketError.ConnectionRefused;
            }
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Signals_that_come_while_the_process_ends_do_not_change_its_status()
    {
        for (int i = 0; i < 20; i++)
        {
            ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo");
            await Wait.Apart(() =>
            {
                while (!proxy.HasExited)
                {
                    proxy.Signal(ProxyProcess.SigTerm);
                }

                return Task.CompletedTask;
            }).Within("its end");
            Assert.Equal(0, await proxy.Exit());
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Without_connections_it_ends_at_once()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        await proxy.Connection(client);
        Stopwatch clock = Stopwatch.StartNew();
        Assert.Equal(0, await proxy.Stop());
        Assert.True(clock.ElapsedMilliseconds < 1_500, $"ended after {clock.ElapsedMilliseconds} ms");
    }

    [Fact(Timeout = Quick)]
    public async Task The_drain_timeout_ends_what_does_not_end_itself()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--drain-timeout", "1s");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Exchange(server, "ping", "pong");
        Stopwatch clock = Stopwatch.StartNew();
        proxy.Signal(ProxyProcess.SigTerm);
        await Task.WhenAll(client.ExpectReset(), server.ExpectReset());
        Assert.InRange(clock.ElapsedMilliseconds, 800, 4_000);
        Assert.Equal(0, await proxy.Exit(5));
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("KD", "shutdown", 4, 4), (line.End, line.Reason, line.BytesUp, line.BytesDown));
    }

    [Fact(Timeout = Quick)]
    public async Task A_second_signal_ends_now()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Exchange(server, "ping", "pong");
        proxy.Signal(ProxyProcess.SigTerm);
        await proxy.Line("draining");
        Stopwatch clock = Stopwatch.StartNew();
        proxy.Signal(ProxyProcess.SigTerm);
        await Task.WhenAll(client.ExpectReset(), server.ExpectReset());
        Assert.Equal(0, await proxy.Exit(5));
        Assert.True(clock.ElapsedMilliseconds < 2_000, $"ended after {clock.ElapsedMilliseconds} ms");
        Assert.Equal("KD", (await proxy.Connection(client)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task A_connection_that_waits_for_its_server_does_not_hold_up_the_end_for_ever()
    {
        Upstream silent = await Given.Silent();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", silent.Address, "--connect-timeout", "60s", "--drain-timeout", "1s", "-v");
        Peer client = await Given.Client(proxy);
        await proxy.Line("accepted");
        await client.Send("anybody there?");
        Assert.Equal(0, await proxy.Stop(6));
        await client.ExpectReset();
        Assert.StartsWith("K", (await proxy.Connection(client)).End, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task A_second_signal_waits_for_no_server_either()
    {
        Upstream silent = await Given.Silent();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", silent.Address, "--connect-timeout", "60s", "-v");
        Peer client = await Given.Client(proxy);
        await proxy.Line("accepted");
        await client.Send("anybody there?");
        proxy.Signal(ProxyProcess.SigTerm);
        await proxy.Line("draining");
        proxy.Signal(ProxyProcess.SigTerm);
        Assert.Equal(0, await proxy.Exit(3));
        await client.ExpectReset();
    }

    [Fact(Timeout = Quick)]
    public async Task Port_and_pid_file_are_gone_at_the_end()
    {
        string pid = Given.Path("pid");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--pid-file", pid);
        Assert.Equal($"{proxy.Id}\n", File.ReadAllText(pid));
        Assert.Equal(0, await proxy.Stop());
        Assert.False(File.Exists(pid), "the pid file is left");
        Assert.False(File.Exists(proxy.PortFilePath), "the port file is left");
        Assert.Empty(Directory.GetFiles(Path.GetDirectoryName(proxy.PortFilePath)!));
    }

    [Fact(Timeout = Quick)]
    public async Task Who_drains_leaves_the_files_of_a_successor()
    {
        string pid = Given.Path("pid");
        ProxyProcess old = await Given.Proxy("127.0.0.1:0", "echo", "--pid-file", pid);
        Peer client = await Given.Client(old);
        await client.Ask("hello");
        old.Signal(ProxyProcess.SigTerm);
        await old.Line("draining");
        ProxyProcess successor = await Given.Proxy($"{old.Addresses[0]}", "echo", "--pid-file", pid);
        client.Dispose();
        Assert.Equal(0, await old.Exit(5));
        Assert.Equal($"{successor.Id}\n", File.ReadAllText(pid));
        await successor.Stop();
        Assert.False(File.Exists(pid), "the pid file is left");
    }

    [Fact(Timeout = Quick)]
    public async Task A_hangup_of_the_terminal_side_signals_is_no_crash()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo");
        const int SigPipe = 13;
        proxy.Signal(SigPipe);
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
    }
}
