using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.NetworkInformation;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class AddressTests : EndToEndTest
{
    [Theory(Timeout = Quick)]
    [InlineData(":0")]
    [InlineData("*:0")]
    public async Task All_interfaces_serve_both_families_on_one_socket(string listen)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(listen, upstream.Address);
        string address = Assert.Single(proxy.Addresses);
        Assert.Equal($"[::]:{proxy.Port}", address);
        foreach (IPAddress loopback in new[] { IPAddress.Loopback, IPAddress.IPv6Loopback })
        {
            Task<Peer> accepted = upstream.Accept();
            Peer client = await Given.Client(new IPEndPoint(loopback, proxy.Port));
            Peer server = await accepted;
            await client.Exchange(server, "ping", "pong");
            client.Finish();
            await server.ExpectEnd();
            server.Finish();
            await client.ExpectEnd();

            // an IPv4 client is written as one, not as ::ffff:127.0.0.1
            LogLine line = await proxy.Connection(client);
            bool isPlain = line["client"].StartsWith("127.0.0.1:", StringComparison.Ordinal);
            Assert.Equal(loopback.Equals(IPAddress.Loopback), isPlain);
        }

        Assert.Equal(listen, (await proxy.Line("listening"))["route"]);
    }

    [Fact(Timeout = Quick)]
    public async Task A_bare_port_is_loopback_only()
    {
        int port = Given.FreePorts(1);
        ProxyProcess proxy = await Given.Proxy($"{port}", "echo");
        await (await Given.Client(new IPEndPoint(IPAddress.Loopback, port))).Ask("hello");
        await (await Given.Client(new IPEndPoint(IPAddress.IPv6Loopback, port))).Ask("hello");
        Assert.Equal(
            new[] { $"127.0.0.1:{port}", $"[::1]:{port}" }.ToHashSet(),
            IPGlobalProperties.GetIPGlobalProperties().GetActiveTcpListeners()
                .Where(l => l.Port == port)
                .Select(l => l.ToString())
                .ToHashSet());
        foreach (IPAddress own in OwnAddresses())
        {
            SocketException refused = await Assert.ThrowsAsync<SocketException>(
                () => Given.Client(new IPEndPoint(own, port)));
            Assert.Equal(SocketError.ConnectionRefused, refused.SocketErrorCode);
        }

        Assert.All(proxy.Addresses, a => Assert.Contains(a, new[] { $"127.0.0.1:{port}", $"[::1]:{port}" }));
    }

    [Fact(Timeout = Quick)]
    public async Task A_bare_port_0_has_the_same_free_port_in_both_families()
    {
        ProxyProcess proxy = await Given.Proxy("0", "echo");
        await (await Given.Client(new IPEndPoint(IPAddress.Loopback, proxy.Port))).Ask("hello");
        await (await Given.Client(new IPEndPoint(IPAddress.IPv6Loopback, proxy.Port))).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task IPv6_is_served_in_brackets()
    {
        Upstream upstream = Given.Echo(new IPEndPoint(IPAddress.IPv6Loopback, 0));
        ProxyProcess proxy = await Given.Proxy("[::1]:0", upstream.Address);
        Assert.StartsWith("[::1]:", Assert.Single(proxy.Addresses), StringComparison.Ordinal);
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        Assert.Equal(upstream.Address, (await proxy.Connection(client))["server"]);
    }

    [Fact(Timeout = Quick)]
    public async Task A_range_is_mapped_one_to_one()
    {
        int listen = Given.FreePorts(6);
        int target = listen + 3;
        for (int i = 0; i < 3; i++)
        {
            Given.Named($"server {i}", new IPEndPoint(IPAddress.Loopback, target + i));
        }

        ProxyProcess proxy = await Given.Proxy(
            $"127.0.0.1:{listen}-{listen + 2}", $"127.0.0.1:{target}-{target + 2}");
        Assert.Equal(Enumerable.Range(listen, 3).Select(p => $"127.0.0.1:{p}"), proxy.Addresses);
        for (int i = 0; i < 3; i++)
        {
            Assert.Equal($"server {i}", await (await Given.Client(proxy, i)).ReceiveLine());
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_range_goes_to_one_port()
    {
        int listen = Given.FreePorts(3);
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy($"127.0.0.1:{listen}-{listen + 2}", upstream.Address);
        for (int i = 0; i < 3; i++)
        {
            await (await Given.Client(proxy, i)).Ask("hello");
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Unix_sockets_are_listened_on_and_connected_to()
    {
        string front = Given.Path("front.sock");
        Upstream upstream = Given.Echo(new UnixDomainSocketEndPoint(Given.Path("back.sock")));
        ProxyProcess proxy = await Given.Proxy($"unix:{front}", upstream.Address);
        Assert.Equal([$"unix:{front}"], proxy.Addresses);
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        LogLine line = await proxy.Connection();
        Assert.Equal((upstream.Address, "--", 5), (line["server"], line.End, line.BytesUp));
        Assert.Equal(0, await proxy.Stop());
        Assert.False(File.Exists(front), "the socket is left");
    }

    [Fact(Timeout = Quick)]
    public async Task A_stale_unix_socket_is_replaced()
    {
        string path = Given.Path("stale.sock");
        using (Socket dead = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            dead.Bind(new UnixDomainSocketEndPoint(path));
            dead.Listen();
            File.Move(path, path + ".kept"); // disposing removes the path it was bound to, not this one
        }

        File.Move(path + ".kept", path);
        ProxyProcess proxy = await Given.Proxy($"unix:{path}", "echo");
        await (await Given.Client(proxy)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task A_live_unix_socket_is_left_alone()
    {
        Upstream live = Given.Named("live", new UnixDomainSocketEndPoint(Given.Path("live.sock")));
        Outcome outcome = await Tool.Proxy(live.Address, "echo");
        string line = Assert.Single(outcome.ErrLines);
        Assert.Contains(live.Address, line, StringComparison.Ordinal);
        Assert.Contains("already in use", line, StringComparison.Ordinal);
        Assert.Equal(1, outcome.Status);
        Assert.Equal("live", await (await Given.Client(live.Endpoint)).ReceiveLine());
    }

    [Fact(Timeout = Quick)]
    public async Task A_file_that_is_no_socket_is_left_alone()
    {
        string file = Given.Write("precious", "data");
        Outcome outcome = await Tool.Proxy($"unix:{file}", "echo");
        Assert.Contains(file, Assert.Single(outcome.ErrLines), StringComparison.Ordinal);
        Assert.Equal(1, outcome.Status);
        Assert.Equal("data", File.ReadAllText(file));
    }

    [Fact(Timeout = Quick)]
    public async Task A_unix_server_that_is_not_there_resets_the_client()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", $"unix:{Given.Path("nobody.sock")}");
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        Assert.Equal("SC", (await proxy.Connection(client)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task An_inherited_descriptor_is_listened_on()
    {
        [DllImport("libc")]
        [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
        static extern int dup(int descriptor);

        [DllImport("libc")]
        [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
        static extern int close(int descriptor);

        using Socket listener = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        listener.Bind(new IPEndPoint(IPAddress.Loopback, 0));
        listener.Listen(16);
        int inherited = dup((int)listener.Handle); // unlike the original, not closed on exec
        ProxyProcess proxy;
        try
        {
            proxy = await Given.Proxy($"fd:{inherited}", "echo");
        }
        finally
        {
            _ = close(inherited);
        }

        Assert.Equal([listener.LocalEndPoint!.ToString()!], proxy.Addresses);
        await (await Given.Client(proxy)).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task A_descriptor_that_is_not_open_is_an_error()
    {
        Outcome outcome = await Tool.Proxy("fd:77", "echo");
        Assert.Contains("fd:77", Assert.Single(outcome.ErrLines), StringComparison.Ordinal);
        Assert.Equal(1, outcome.Status);
    }

    [Theory(Timeout = Quick)]
    [InlineData("fd:web")]
    [InlineData("fd:3")]
    public async Task Systemd_hands_over_its_sockets_by_name_and_number(string listen)
    {
        string activate = Tool.Need("systemd-socket-activate", "systemd");
        int port = Given.FreePorts(1);
        Launch launch = new()
        {
            Before = [activate, "--fdname=web", "-l", $"127.0.0.1:{port}"],
            Chatter = ["Listening on ", "Communication attempt", "Execing "],
            AwaitReady = false,
        };
        ProxyProcess proxy = await Given.Proxy(launch, listen, "echo");
        Peer? client = null;
        await Wait.Until(() => (client = TryConnect(port)) is not null, "systemd-socket-activate to listen");
        await Given.Client(client!).Ask("hello");
        await proxy.Ready();
        Assert.Equal([$"127.0.0.1:{port}"], proxy.Addresses);
    }

    [Fact(Timeout = Quick)]
    public async Task Several_sockets_of_systemd_are_told_apart_by_their_names()
    {
        string activate = Tool.Need("systemd-socket-activate", "systemd");
        int port = Given.FreePorts(2);
        Launch launch = new()
        {
            Before = [activate, "--fdname=one:two", "-l", $"127.0.0.1:{port}", "-l", $"127.0.0.1:{port + 1}"],
            Chatter = ["Listening on ", "Communication attempt", "Execing "],
            AwaitReady = false,
        };
        Upstream first = Given.Named("first");
        Upstream second = Given.Named("second");
        ProxyProcess proxy = await Given.Proxy(
            launch, "-l", "fd:two", "-u", second.Address, "-l", "fd:one", "-u", first.Address);
        Peer? client = null;
        await Wait.Until(() => (client = TryConnect(port)) is not null, "systemd-socket-activate to listen");
        Assert.Equal("first", await Given.Client(client!).ReceiveLine());
        await proxy.Ready();
        Assert.Equal([$"127.0.0.1:{port + 1}", $"127.0.0.1:{port}"], proxy.Addresses);
        Assert.Equal("second", await (await Given.Client(proxy)).ReceiveLine());
    }

    [Fact(Timeout = Quick)]
    public async Task Two_proxies_do_not_share_an_address()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo");
        Outcome second = await Tool.Proxy(proxy.Addresses[0], "echo");
        Assert.EndsWith("address already in use", second.ErrLines[^1], StringComparison.Ordinal);
        Assert.Equal(1, second.Status);
    }

    [Theory(Timeout = Quick)]
    [InlineData("127.0.0.1")]
    [InlineData("::1")]
    public async Task A_bare_port_wants_both_loopback_addresses(string taken)
    {
        int port = Given.FreePorts(1);
        Given.Server(new IPEndPoint(IPAddress.Parse(taken), port));
        Outcome outcome = await Tool.Proxy($"{port}", "echo");
        Assert.EndsWith("address already in use", outcome.ErrLines[^1], StringComparison.Ordinal);
        Assert.Equal(1, outcome.Status);
    }

    [Fact(Timeout = Quick)]
    public async Task A_range_of_three_hundred_ports_is_served()
    {
        const int Count = 300;
        int port = Given.FreePorts(Count);
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy($"127.0.0.1:{port}-{port + Count - 1}", upstream.Address);
        Assert.Equal(Count, proxy.Addresses.Count);
        foreach (int i in new[] { 0, 150, Count - 1 })
        {
            await (await Given.Client(proxy, i)).Ask("hello");
        }
    }

    [Fact(Timeout = Quick)]
    public async Task The_built_in_servers_echo_and_discard()
    {
        const int Length = 30_000_000;
        Pattern pattern = new(9);
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", "echo", "-l", "127.0.0.1:0", "-u", "discard");
        Peer echo = await Given.Client(proxy, 0);
        Task sending = echo.Send(pattern, Length);
        await echo.Receive(pattern, Length);
        await sending;
        echo.Finish();
        await echo.ExpectEnd();
        LogLine line = await proxy.Connection(echo);
        Assert.Equal((Length, Length, "--"), (line.BytesUp, line.BytesDown, line.End));
        Assert.Equal("echo", line["upstream"]);

        Peer discard = await Given.Client(proxy, 1);
        await discard.Send(pattern, Length);
        discard.Finish();
        await discard.ExpectEnd();
        line = await proxy.Connection(discard);
        Assert.Equal((Length, 0, "--"), (line.BytesUp, line.BytesDown, line.End));
    }

    [Fact(Timeout = Quick)]
    public async Task The_port_file_names_every_address_in_the_order_of_the_listens()
    {
        int range = Given.FreePorts(2);
        string socket = Given.Path("a.sock");
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", "echo", "-l", $"127.0.0.1:{range}-{range + 1}", "-u", "echo",
            "-l", "[::1]:0", "-u", "echo", "-l", $"unix:{socket}", "-u", "echo", "-l", ":0", "-u", "echo");
        Assert.Equal(6, proxy.Addresses.Count);
        Assert.Matches(@"^127\.0\.0\.1:\d+$", proxy.Addresses[0]);
        Assert.Equal([$"127.0.0.1:{range}", $"127.0.0.1:{range + 1}"], proxy.Addresses.Skip(1).Take(2));
        Assert.Matches(@"^\[::1\]:\d+$", proxy.Addresses[3]);
        Assert.Equal($"unix:{socket}", proxy.Addresses[4]);
        Assert.Matches(@"^\[::\]:\d+$", proxy.Addresses[5]);
        for (int i = 0; i < 6; i++)
        {
            await (await Given.Client(proxy, i)).Ask($"listen {i}");
        }

        // whole or not at all: nothing but the file itself is left in its folder
        Assert.Equal([proxy.PortFilePath], Directory.GetFiles(Path.GetDirectoryName(proxy.PortFilePath)!));
        Assert.EndsWith("\n", File.ReadAllText(proxy.PortFilePath), StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task A_taken_address_names_the_route_and_starts_nothing()
    {
        Upstream taken = Given.Server();
        string ports = Given.Path("ports");
        Outcome outcome = await Tool.Proxy(
            "--port-file", ports, "-l", "127.0.0.1:0", "-u", "echo",
            "-l", taken.Address, "-u", "echo", "--name", "second");
        string line = outcome.ErrLines[^1];
        Assert.Equal(
            $"tcpproxy: error: route second: cannot listen on {taken.Address}: address already in use", line);
        Assert.Equal((1, string.Empty), (outcome.Status, outcome.Out));
        Assert.False(File.Exists(ports), "the port file is left");
    }

    [Fact(Timeout = Quick)]
    public async Task An_address_of_somebody_else_cannot_be_listened_on()
    {
        Outcome outcome = await Tool.Proxy("203.0.113.77:0", "echo");
        string line = outcome.ErrLines[^1];
        const string Expected = "tcpproxy: error: route 203.0.113.77:0: cannot listen on 203.0.113.77:0: ";
        Assert.StartsWith(Expected, line, StringComparison.Ordinal);
        Assert.Equal(1, outcome.Status);
    }

    [Fact(Timeout = Quick)]
    public async Task A_port_just_left_is_taken_again()
    {
        int port = Given.FreePorts(1);
        for (int i = 0; i < 3; i++)
        {
            ProxyProcess proxy = await Given.Proxy($"127.0.0.1:{port}", "echo", "--drain-timeout", "100ms");
            Peer client = await Given.Client(proxy);
            await client.Ask("hello");
            await proxy.Stop();
        }
    }

    private static Peer? TryConnect(int port)
    {
        Socket socket = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            socket.Connect(IPAddress.Loopback, port);
            return new Peer(socket);
        }
        catch (SocketException)
        {
            socket.Dispose();
            return null;
        }
    }

    private static IEnumerable<IPAddress> OwnAddresses() =>
        NetworkInterface.GetAllNetworkInterfaces()
            .SelectMany(i => i.GetIPProperties().UnicastAddresses)
            .Select(a => a.Address)
            .Where(a => !IPAddress.IsLoopback(a) && !a.IsIPv6LinkLocal);

    [Fact(Timeout = Quick)]
    public async Task A_file_that_is_no_socket_is_never_removed()
    {
        // a program that runs cannot be opened for writing, and refuses a connection as a stale socket does
        string sleep = Tool.Need("sleep", "coreutils");
        string victim = Given.Path("victim");
        System.IO.File.Copy(sleep, victim);
        Tool.Background(Given, victim, "60");
        Outcome outcome = await Tool.Proxy($"unix:{victim}", "echo");
        Assert.Equal(1, outcome.Status);
        Assert.Contains("address already in use", outcome.Err, System.StringComparison.Ordinal);
        Assert.True(System.IO.File.Exists(victim), "the file was removed");
    }
}
