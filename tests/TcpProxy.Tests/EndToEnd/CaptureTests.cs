using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--pcap: what wireshark's own reader makes of it, and what becomes of connections when it fails.</summary>
public sealed class CaptureTests : EndToEndTest
{
    private const int BlockOfPacket = 6;

    /// <summary>What tshark may remark on a connection that is as it should be.</summary>
    private static readonly string[] Harmless =
    [
        "Connection establish request (SYN)", "Connection establish acknowledge (SYN+ACK)", "Connection finish (FIN)",
        "Connection reset (RST)", "This frame initiates the connection closing", "This frame undergoes the connection closing",
    ];

    private enum Ending
    {
        ClientFirst, // sends all and FIN, then the server does
        ServerFirst,
        ClientResets,
        ServerResets,
        ProxyResets, // it is silent for too long
    }

    [Fact(Timeout = Slow)]
    public async Task Fifty_random_conversations_are_followed_by_tshark_byte_by_byte_without_a_remark()
    {
        string tshark = Tool.Need("tshark", "tshark");
        int seed = Random.Shared.Next();
        TestContext.Current.TestOutputHelper?.WriteLine($"seed {seed}");
        Random random = new(seed);
        Upstream v4 = Given.Server();
        Upstream v6 = Given.Server(new IPEndPoint(IPAddress.IPv6Loopback, 0));
        Upstream unix = Given.Server(new UnixDomainSocketEndPoint(Given.Path("server")));
        string file = Given.Path("capture.pcapng");
        string listen = $"unix:{Given.Path("client")}";
        (string Listen, Upstream Server)[] routes =
            [("127.0.0.1:0", v4), ("[::1]:0", v6), ("127.0.0.1:0", v6), ("[::1]:0", v4), (listen, v4), ("[::1]:0", unix)];
        ProxyProcess proxy = await Given.Proxy(
            ["--idle-timeout", "2s", .. routes.SelectMany(r => new[] { "-l", r.Listen, "-u", r.Server.Address, "--pcap", file })]);

        List<Conversed> all = [];
        for (int i = 0; i < 50; i++)
        {
            int route = i % routes.Length;
            bool hasReset = (i % 5) switch // which unix sockets have not
            {
                (int)Ending.ClientResets => route != 4,
                (int)Ending.ServerResets => route != 5,
                _ => true,
            };
            Ending ending = hasReset ? (Ending)(i % 5) : Ending.ClientFirst;
            all.Add(await Converse(proxy, route, routes[route].Server, ending, random, i));
        }

        await Task.WhenAll(all.Select(one => one.Done));
        await proxy.LinesOf("connection", all.Count);
        await proxy.Stop();

        // in two runs, since tshark is slow to start: each packet with what tshark thinks of it, and the streams
        string[] checks = ["-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE", "-d", "tcp.port==1-65535,data"];
        string[] fields =
        [
            "tcp.stream", "ip.src", "ipv6.src", "tcp.srcport", "tcp.flags", "ip.checksum.status", "tcp.checksum.status",
            "frame.time_epoch", "_ws.expert.message", "_ws.malformed",
        ];
        string table = (await Tool.Run(
            tshark, ["-n", "-r", file, .. checks, "-T", "fields", "-E", "separator=;", .. fields.SelectMany(f => new[] { "-e", f })], 120)).Good();
        List<string[]> packets = [.. table.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(line => line.Split(';'))];
        string lastTime = string.Empty;
        foreach (string[] packet in packets)
        {
            string line = string.Join(';', packet);
            Assert.True(packet[5] is "1" or "" && packet[6] == "1", $"wrong checksum: {line}");
            Assert.All(packet[8].Split(',').Where(m => m.Length > 0), remark => Assert.Contains(
                Harmless, harmless => remark.StartsWith(harmless, StringComparison.Ordinal)));
            Assert.True(packet[9].Length == 0, $"malformed: {line}");
            Assert.True(string.CompareOrdinal(packet[7], lastTime) >= 0, $"back in time: {line}");
            lastTime = packet[7];
        }

        string followed = (await Tool.Run(
            tshark, ["-n", "-q", "-r", file, .. checks, .. Enumerable.Range(0, all.Count).SelectMany(i => new[] { "-z", $"follow,tcp,raw,{i}" })], 120)).Good();
        string[] streams = followed.Split("Follow: tcp,raw")[1..];
        Assert.Equal(all.Count, streams.Length);
        foreach (Conversed one in all)
        {
            string stream = Assert.Single(
                streams, text => text.Contains($"Node 0: {one.Client}\nNode 1: {one.Server}\n", StringComparison.Ordinal));
            string[] lines = stream.Split('\n');
            string number = lines.First(l => l.StartsWith("Filter", StringComparison.Ordinal)).Split(' ')[^1];
            List<string> hex = [.. lines.Where(l => l.Length > 0 && l.TrimStart('\t').All(char.IsAsciiHexDigit))];
            Assert.Equal(one.Up, Bytes(hex.Where(l => l[0] != '\t')));
            Assert.Equal(one.Down, Bytes(hex.Where(l => l[0] == '\t').Select(l => l[1..])));
            List<string[]> own = packets.FindAll(p => p[0] == number);
            string[] ends = [.. own.Select(p => (Flags: Convert.ToInt32(p[4], 16) & 5, IsUp: p[3] == one.Port))
                .Where(p => p.Flags != 0).Select(p => (p.IsUp ? "client " : "server ") + (p.Flags == 1 ? "FIN" : "RST"))];
            Assert.Equal(one.Ending switch
            {
                Ending.ClientFirst => ["client FIN", "server FIN"],
                Ending.ServerFirst => ["server FIN", "client FIN"],
                Ending.ClientResets => ["client RST"],
                Ending.ServerResets => ["server RST"],
                _ => new[] { "client RST", "server RST" },
            }, ends.Order(StringComparer.Ordinal).SequenceEqual(["client RST", "server RST"]) ? ends.Order() : ends);
            Assert.All(own, p => Assert.Equal(one.IsV4, p[1].Length > 0));
        }

        static byte[] Bytes(IEnumerable<string> lines) => Convert.FromHexString(string.Concat(lines));
    }

    [Fact(Timeout = Quick)]
    public async Task Rotated_files_are_named_as_tcpdump_does_and_each_is_whole_and_small()
    {
        const int Limit = 100 << 10;
        string file = Given.Path("r");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--pcap", file, "--pcap-rotate", "100k");
        long sent = 0;
        for (int i = 0; i < 20; i++)
        {
            Peer client = await Given.Client(proxy);
            Pattern pattern = new(i);
            await client.Send(pattern, 5_000 * i);
            await client.Receive(pattern, 5_000 * i);
            sent += 5_000 * i;
            client.Dispose();
        }

        await proxy.LinesOf("connection", 20);
        await proxy.Stop();
        string[] files = Directory.GetFiles(Given.Folder, "r*");
        List<string> names = [file, .. Enumerable.Range(1, files.Length - 1).Select(i => $"{file}{i}")];
        Assert.Equal(names.Order(), files.Order());
        Assert.True(files.Length > 2 * sent / Limit, $"{files.Length} files for {2 * sent} bytes");
        Assert.All(names, name => Assert.InRange(new FileInfo(name).Length, 89, Limit));
        Assert.Equal(2 * sent, names.Sum(name => Packets(File.ReadAllBytes(name)).Sum(Payload)));
    }

    [Fact(Timeout = Quick)]
    public async Task A_packet_is_on_stdout_at_once_and_connections_go_on_when_its_reader_has_left()
    {
        (ProxyProcess proxy, FileStream reader) = await WithPipe("127.0.0.1:0", "echo", "--pcap", "-");
        Peer client = await Given.Client(proxy);
        byte[] buffer = new byte[1 << 20];
        await client.Ask("hello");
        int length = 0;
        double least = double.MaxValue;
        for (int i = 0; i < 5; i++)
        {
            long start = Stopwatch.GetTimestamp();
            await client.Ask($"live{i}");
            while (!Encoding.ASCII.GetString(buffer, 0, length).Contains($"live{i}", StringComparison.Ordinal))
            {
                length += await reader.ReadAsync(buffer.AsMemory(length), TestContext.Current.CancellationToken);
            }

            least = Math.Min(least, Stopwatch.GetElapsedTime(start).TotalMilliseconds);
        }

        Assert.True(least < 100, $"a packet took {least} ms to be seen");
        await reader.DisposeAsync();
        proxy.Tolerate("pcap");
        await client.Ask("on");
        LogLine line = await proxy.Line("pcap");
        Assert.Contains("-", line["message"], StringComparison.Ordinal);
        await client.Ask("and on");
        client.Dispose();
        Peer second = await Given.Client(proxy);
        await second.Send(new Pattern(1), 5_000_000).AndReceive(second, new Pattern(1), 5_000_000);
        Assert.Single(proxy.Lines, l => l.Event == "pcap");
    }

    [Fact(Timeout = Slow)]
    public async Task A_reader_that_stops_holds_traffic_for_some_seconds_and_no_longer()
    {
        (ProxyProcess proxy, FileStream reader) = await WithPipe("127.0.0.1:0", "echo", "--pcap", "-");
        Given.Owned(reader);
        proxy.Tolerate("pcap");
        Peer client = await Given.Client(proxy);
        long start = Environment.TickCount64;
        await client.Send(new Pattern(1), 20_000_000).AndReceive(client, new Pattern(1), 20_000_000);
        Assert.InRange(Environment.TickCount64 - start, 3_000, 20_000);
        Assert.Contains("reader", (await proxy.Line("pcap"))["message"], StringComparison.Ordinal);
        Assert.Single(proxy.Lines, l => l.Event == "pcap");
    }

    [Fact(Timeout = Slow)]
    public async Task All_who_wait_for_a_reader_go_on_when_it_has_left()
    {
        const int Count = 150;
        (ProxyProcess proxy, FileStream reader) = await WithPipe("127.0.0.1:0", "discard", "--pcap", "-");
        Given.Owned(reader);
        proxy.Tolerate("pcap");
        Task all = Wait.Apart(() => Wait.Many(Count, Count, async i =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            await client.Send(new Pattern(i), 2_000_000);
            client.Finish();
            await client.ExpectEnd(60);
        }));
        await Wait.Pause(2_000); // so that all wait for room, but the proxy has not given the reader up yet
        Assert.DoesNotContain(proxy.Lines, l => l.Event == "pcap");
        await reader.DisposeAsync();
        await all.Within("the end of all of them", 15);
        Assert.All(await proxy.LinesOf("connection", Count), line => Assert.Equal(("--", 2_000_000), (line.End, line.BytesUp)));
        Assert.Single(proxy.Lines, l => l.Event == "pcap");
    }

    [Fact(Timeout = Slow)]
    public async Task A_stop_while_a_reload_still_waits_for_such_a_reader_is_orderly()
    {
        const string Plain = "listen 127.0.0.1:0\nname plain\nupstream echo\n";
        string file = Given.Write("conf", $"{Plain}listen 127.0.0.1:0\nname captured\nupstream echo\npcap -\n");
        (ProxyProcess proxy, FileStream reader) = await WithPipe("-c", file);
        Given.Owned(reader);
        proxy.Tolerate("pcap");
        Peer client = await Given.Client(proxy, 1);
        await client.Send(new Pattern(1), 256 << 10).AndReceive(client, new Pattern(1), 256 << 10);
        client.Dispose();
        await proxy.LinesOf("connection", 1);
        Given.Write("conf", Plain);
        proxy.Signal(ProxyProcess.SigHup);
        await proxy.Line("reload");
        Assert.Equal(0, await proxy.Stop(15));
        Assert.Equal("stopped", proxy.Lines.Last(line => line.Event != "pcap").Event);
    }

    [Fact(Timeout = Slow)]
    public async Task What_a_reload_has_taken_away_is_written_to_its_end()
    {
        const int Length = 1 << 20;
        const string Route = "listen 127.0.0.1:0\nupstream echo\n";
        (ProxyProcess proxy, FileStream reader) = await WithPipe("-c", Given.Write("conf", $"{Route}pcap -\n"));
        Peer client = await Given.Client(proxy);
        await client.Send(new Pattern(1), Length).AndReceive(client, new Pattern(1), Length);
        Given.Write("conf", Route);
        proxy.Signal(ProxyProcess.SigHup);
        await proxy.Line("reload");
        await Wait.Pause(1_500); // until the client alone keeps the route
        proxy.Signal(ProxyProcess.SigTerm);
        await proxy.Line("draining");
        client.Dispose();
        await proxy.Line("stopped");
        await Wait.Pause(1_000); // a reader that is late, but not too late
        using MemoryStream read = new();
        await reader.CopyToAsync(read, TestContext.Current.CancellationToken).Within("the end of the capture");
        await reader.DisposeAsync();
        Assert.Equal(0, await proxy.Exit());
        Assert.Equal(2 * Length, Packets(read.ToArray()).Sum(Payload));
    }

    [Fact(Timeout = Slow)]
    public async Task A_full_disk_ends_the_capture_with_one_line_and_what_is_there_can_be_read()
    {
        string file = Path.Combine(await Disk("1m"), "full.pcapng");
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--pcap", file);
        proxy.Tolerate("pcap");
        for (int i = 0; i < 3; i++)
        {
            Peer client = await Given.Client(proxy);
            await client.Send(new Pattern(i), 5_000_000).AndReceive(client, new Pattern(i), 5_000_000);
            client.Dispose();
        }

        LogLine line = Assert.Single(await proxy.LinesOf("pcap", 1));
        Assert.Contains(file, line["message"], StringComparison.Ordinal);
        Assert.Contains("space", line["message"], StringComparison.Ordinal);
        Assert.All(await proxy.LinesOf("connection", 3), connection => Assert.Equal("--", connection.End));
        Assert.InRange(Packets(await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken)).Count, 10, 1_000);
        Assert.Single(proxy.Lines, l => l.Event == "pcap");
    }

    [Theory(Timeout = Slow)]
    [InlineData(0)] // read as the length of a block, this would be none
    [InlineData(0x7f)] // behind the end
    [InlineData(0x80)] // before the beginning
    public async Task A_disk_that_is_full_in_a_file_before_the_newest_leaves_whole_blocks(int fill)
    {
        const int Rotate = 1200 << 10;
        const int Length = 4_650_000; // with its heads, three files and of the fourth more than a megabyte
        const int Room = 1_120_000; // for the third: more than a megabyte, and not all
        string disk = await Disk("8m");
        string file = Path.Combine(disk, "c");
        (await Tool.Run("mkfifo", $"{file}1")).Good(); // holds up the writer, as a slow disk would
        Task<FileStream> opening = Wait.Apart(() => Task.FromResult(new FileStream($"{file}1", FileMode.Open, FileAccess.Read, FileShare.ReadWrite, 0)));
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "discard", "--toxic", "slicer average_size=4000 size_variation=2000 delay=0 stream=upstream", // no two files alike
            "--pcap", file, "--pcap-rotate", "1200k");
        proxy.Tolerate("pcap");
        byte[] bytes = new byte[Length];
        Array.Fill(bytes, (byte)fill);
        Peer client = await Given.Client(proxy);
        Task sending = client.Send(bytes);
        FileStream reader = Given.Owned(await opening.Within("the writer of the second file"));
        await reader.ReadExactlyAsync(new byte[1_100_000], TestContext.Current.CancellationToken); // nearly all: the others find room behind it
        await sending;
        client.Finish();
        await client.ExpectEnd();
        await proxy.Connection(client);
        Assert.InRange(new FileInfo(file).Length, Rotate - 10_000, Rotate);
        Assert.False(File.Exists($"{file}2"));
        Assert.DoesNotContain(proxy.Lines, l => l.Event == "pcap");

        await File.WriteAllBytesAsync(
            Path.Combine(disk, "other"), new byte[new DriveInfo(disk).AvailableFreeSpace - Room], TestContext.Current.CancellationToken);
        await reader.CopyToAsync(Stream.Null, TestContext.Current.CancellationToken).Within("the end of the second file", 10);
        Assert.Contains("space", (await proxy.Line("pcap", seconds: 10))["message"], StringComparison.Ordinal);
        Peer second = await Given.Client(proxy);
        await second.Send(bytes);
        second.Finish();
        await second.ExpectEnd();
        Assert.Equal(0, await proxy.Stop());
        byte[] third = await File.ReadAllBytesAsync($"{file}2", TestContext.Current.CancellationToken);
        Assert.InRange(third.Length, 1 << 20, Room);
        Assert.InRange(Packets(third).Count, 200, 1_000);
        Assert.All( // nothing behind the gap
            Directory.GetFiles(disk, "c*").Except([file, $"{file}1", $"{file}2"]), later => Assert.Equal(0, new FileInfo(later).Length));
        Assert.Single(proxy.Lines, l => l.Event == "pcap");
    }

    [Fact(Timeout = Quick)]
    public async Task What_the_client_said_before_there_was_a_server_is_captured()
    {
        string file = Given.Path("c");
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", server.Address, "--accept-proxy", "127.0.0.0/8", "--pcap", file);
        Peer client = await Given.Client(proxy);
        await client.Send("PROXY TCP4 203.0.113.9 198.51.100.2 40001 443\r\nhello");
        Peer accepted = await server.Accept();
        await accepted.ReceiveText("hello");
        client.Finish();
        accepted.Finish();
        await proxy.Connection("203.0.113.9:40001");
        await proxy.Stop();
        byte[][] packets = [.. Packets(await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken))];
        Assert.Equal([203, 0, 113, 9], packets[0][12..16]);
        Assert.Equal("hello"u8.ToArray(), packets[3][40..]);
    }

    [Fact(Timeout = Quick)]
    public async Task A_file_that_cannot_be_opened_is_one_line_and_status_one()
    {
        Outcome outcome = await Tool.Proxy("127.0.0.1:0", "echo", "--pcap", Given.Path("nowhere/c"));
        Assert.Equal(1, outcome.Status);
        Assert.Matches(@"error: --pcap: cannot open \S+/nowhere/c: no such file or directory\n$", outcome.Err);
    }

    [Fact(Timeout = Quick)]
    public async Task A_pipe_that_nobody_reads_yet_neither_stops_the_start_nor_loses_what_comes_first()
    {
        string pipe = Given.Path("pipe");
        (await Tool.Run("mkfifo", pipe)).Good();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--pcap", pipe);
        Peer client = await Given.Client(proxy);
        await client.Ask("first");
        using FileStream reader = await Wait.Apart(() => Task.FromResult(
            new FileStream(pipe, FileMode.Open, FileAccess.Read, FileShare.ReadWrite, 0))).Within("the writer of the pipe");
        byte[] buffer = new byte[1 << 16];
        int length = 0;
        await client.Ask("second");
        while (!Encoding.ASCII.GetString(buffer, 0, length).Contains("second", StringComparison.Ordinal))
        {
            length += await reader.ReadAsync(buffer.AsMemory(length), TestContext.Current.CancellationToken);
        }

        Assert.Equal([0x0A, 0x0D, 0x0D, 0x0A], buffer[..4]);
        Assert.Contains("first", Encoding.ASCII.GetString(buffer, 0, length), StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task Taps_and_a_header_to_the_server_go_together()
    {
        string file = Given.Path("c");
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", server.Address, "--send-proxy", "v1", "--pcap", file);
        (Peer client, Peer accepted) = await Given.Bridge(proxy, server);
        Assert.StartsWith("PROXY TCP4 127.0.0.1 ", await accepted.ReceiveLine(), StringComparison.Ordinal);
        await client.Exchange(accepted, "hello", "world");
        client.Finish();
        accepted.Finish();
        await proxy.Connection();
        await proxy.Stop();
        byte[][] packets = [.. Packets(await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken))];
        Assert.Equal("hello"u8.ToArray(), packets[3][40..]); // the header is the proxy's own
    }

    [Fact(Timeout = Quick)]
    public async Task Who_is_reset_before_there_is_a_bridge_is_over_in_the_capture_too()
    {
        const int Count = 200;
        string file = Given.Path("c");
        Upstream server = Given.Server(peer =>
        {
            peer.Reset(); // at once: some headers find nobody
            return Task.CompletedTask;
        });
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", server.Address, "--send-proxy", "v1", "--pcap", file, "--retries", "0");
        await Wait.Many(Count, 8, async _ =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            await client.Drain();
        });
        await proxy.LinesOf("connection", Count);
        await proxy.Stop();
        Dictionary<int, int> flags = [];
        foreach (byte[] packet in Packets(await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken)))
        {
            int client = (packet[20] << 8) + packet[21] == server.Port ? (packet[22] << 8) + packet[23] : (packet[20] << 8) + packet[21];
            flags[client] = flags.GetValueOrDefault(client) | packet[33];
        }

        Assert.InRange(flags.Count, 1, Count);
        Assert.All(flags.Values, seen => Assert.True((seen & 5) != 0, "neither FIN nor RST"));
    }

    // ---- conversations

    private sealed record Conversed(
        Ending Ending, string Client, string Server, string Port, bool IsV4, byte[] Up, byte[] Down, Task Done);

    private async Task<Conversed> Converse(
        ProxyProcess proxy, int route, Upstream upstream, Ending ending, Random random, int number)
    {
        byte[] up = Random(), down = Random();
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream, route);
        bool isV6 = client.Socket.RemoteEndPoint is IPEndPoint { AddressFamily: AddressFamily.InterNetworkV6 }
            || upstream.Endpoint is IPEndPoint { AddressFamily: AddressFamily.InterNetworkV6 };
        string client0 = client.Socket.LocalEndPoint is IPEndPoint ip ? Address(ip) : $"192.0.2.1:{1024 + number + 1}";
        string port = client0[(client0.LastIndexOf(':') + 1)..];
        string server0 = upstream.Endpoint is IPEndPoint at ? Address(at) : isV6 ? "[::ffff:192.0.2.2]:1" : "192.0.2.2:1";

        // a unix client's stand-in is numbered as its capture begins, which it has once a byte is through
        bool isServerFirst = ending == Ending.ServerFirst;
        await (isServerFirst ? Half(server, client, down[..1], false) : Half(client, server, up[..1], false));
        return new Conversed(
            ending, client0, server0, port, !isV6, up, down, isServerFirst ? Run(up, down[1..]) : Run(up[1..], down));

        string Address(IPEndPoint end) => isV6 ? Mapped(end) : end.ToString();

        static string Mapped(IPEndPoint end) => end.AddressFamily == AddressFamily.InterNetworkV6 ? end.ToString() : $"[::ffff:{end.Address}]:{end.Port}";

        byte[] Random()
        {
            byte[] bytes = new byte[1 + (random.Next(4) == 0 ? random.Next(200_000) : random.Next(2_000))];
            random.NextBytes(bytes);
            return bytes;
        }

        async Task Run(byte[] upward, byte[] downward)
        {
            switch (ending)
            {
                case Ending.ClientFirst:
                    await Half(client, server, upward, true);
                    await Half(server, client, downward, true);
                    return;
                case Ending.ServerFirst:
                    await Half(server, client, downward, true);
                    await Half(client, server, upward, true);
                    return;
                default:
                    await Task.WhenAll(Half(client, server, upward, false), Half(server, client, downward, false));
                    (ending == Ending.ClientResets ? client : ending == Ending.ServerResets ? server : null)?.Reset();
                    return;
            }
        }

        static async Task Half(Peer from, Peer to, byte[] bytes, bool isWhole)
        {
            Task<byte[]> receiving = to.Receive(bytes.Length);
            await from.Send(bytes);
            Assert.Equal(bytes, await receiving);
            if (isWhole)
            {
                from.Finish();
                await to.ExpectEnd();
            }
        }
    }

    /// <summary>A file system of its own, of that size.</summary>
    private async Task<string> Disk(string size)
    {
        Tool.NeedRoot("a file system of its own");
        string disk = Directory.CreateDirectory(Given.Path("disk")).FullName;
        Outcome mounted = await Tool.Run("mount", "-t", "tmpfs", "-o", $"size={size}", "none", disk);
        Assert.SkipUnless(mounted.Status == 0, $"cannot mount here: {mounted.Err}");
        Given.AtEnd(() => Tool.Run("umount", "-l", disk));
        return disk;
    }

    /// <summary>Its stdout is a pipe that the test reads.</summary>
    private async Task<(ProxyProcess Proxy, FileStream Reader)> WithPipe(params string[] arguments)
    {
        string pipe = Given.Path("pipe");
        (await Tool.Run("mkfifo", pipe)).Good();
        Task<FileStream> opening = Wait.Apart(() => Task.FromResult(new FileStream(pipe, FileMode.Open, FileAccess.Read, FileShare.ReadWrite, 0)));
        Launch launch = Launch.FromShell(streams: $">{pipe}");
        ProxyProcess proxy = await Given.Proxy(launch, arguments);
        return (proxy, await opening);
    }

    // ---- reading captures

    /// <summary>The packets of a file, each of whose blocks is whole and in its place.</summary>
    private static List<byte[]> Packets(byte[] file)
    {
        List<byte[]> packets = [];
        Assert.Equal([0x0A, 0x0D, 0x0D, 0x0A], file[..4]);
        for (int i = 0, length; i < file.Length; i += length)
        {
            length = BitConverter.ToInt32(file, i + 4);
            Assert.Equal(length, BitConverter.ToInt32(file, i + length - 4));
            if (BitConverter.ToInt32(file, i) == BlockOfPacket)
            {
                packets.Add(file[(i + 28)..(i + 28 + BitConverter.ToInt32(file, i + 20))]);
            }
        }

        return packets;
    }

    private static int Payload(byte[] packet) => packet.Length - 20 - ((packet[32] >> 4) * 4);
}

internal static class Both
{
    /// <summary>At the same time.</summary>
    public static Task AndReceive(this Task sending, Peer peer, Pattern pattern, long length) =>
        Task.WhenAll(sending, peer.Receive(pattern, length));
}
