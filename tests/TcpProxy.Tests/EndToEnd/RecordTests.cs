using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--record: two files a connection, as the original's v03 writes them.</summary>
public sealed class RecordTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task What_each_side_sent_is_in_a_file_of_its_own()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--record", Given.Folder, "--drain-timeout", "100ms");
        DateTime before = DateTime.UtcNow;
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Exchange(server, "a question\r\n", "an answer\0");
        client.Finish(); // and still receives
        await server.ExpectEnd();
        await server.Send("afterwards");
        server.Dispose();
        Assert.Equal("afterwards"u8.ToArray(), await client.ReceiveToEnd());
        await proxy.Stop();

        string[] files = [.. Directory.GetFiles(Given.Folder, "*.log").Select(Path.GetFileName).Order(StringComparer.Ordinal)!];
        Assert.Equal(2, files.Length);
        Match name = Regex.Match(files[0], @"^ds_127\.0\.0\.1_(\d{14})\.log$");
        Assert.True(name.Success, files[0]);
        Assert.Equal($"us_127.0.0.1_{name.Groups[1].Value}.log", files[1]);
        DateTime time = DateTime.ParseExact(
            name.Groups[1].Value, "yyyyMMddHHmmss", CultureInfo.InvariantCulture, DateTimeStyles.AssumeUniversal | DateTimeStyles.AdjustToUniversal);
        Assert.InRange(time, before.AddSeconds(-1), DateTime.UtcNow);
        Assert.Equal("a question\r\n", File.ReadAllText(Given.Path(files[0])));
        Assert.Equal("an answer\0afterwards", File.ReadAllText(Given.Path(files[1])));
        Assert.All(files, f => Assert.True(
            OperatingSystem.IsWindows() || File.GetUnixFileMode(Given.Path(f)) == (UnixFileMode.UserRead | UnixFileMode.UserWrite), f));
        Assert.Empty(Directory.GetFiles(Given.Folder, ".*"));
    }

    [Fact(Timeout = Slow)]
    public async Task Two_hundred_connections_at_once_are_recorded_byte_for_byte()
    {
        const int Count = 200;
        Upstream upstream = Given.Server(async peer =>
        {
            int seed = BitConverter.ToInt32(await peer.Receive(4));
            Task sending = peer.Send(new Pattern(-seed), Length(seed + 1));
            await peer.Receive(new Pattern(seed), Length(seed));
            await sending;
            await peer.ExpectEnd();
            peer.Dispose();
        });
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--record", Given.Folder, "--drain-timeout", "100ms");
        int idle = proxy.Descriptors;
        await Wait.Many(Count, Count, async i =>
        {
            int seed = i + 1;
            using Peer client = await Peer.Connect(proxy.Endpoint(), new IPEndPoint(new IPAddress([127, 0, 7, (byte)i]), 0));
            await client.Send(BitConverter.GetBytes(seed));
            Task sending = client.Send(new Pattern(seed), Length(seed));
            await client.Receive(new Pattern(-seed), Length(seed + 1));
            await sending;
            client.Finish();
            await client.ExpectEnd();
        });
        await Wait.Until(() => proxy.Descriptors <= idle + 6 + Tool.LateFiles, "all files to be closed");
        await proxy.Stop();
        for (int i = 0; i < Count; i++)
        {
            int seed = i + 1;
            byte[] sent = File.ReadAllBytes(Assert.Single(Directory.GetFiles(Given.Folder, $"ds_127.0.7.{i}_*.log")));
            byte[] answered = File.ReadAllBytes(Assert.Single(Directory.GetFiles(Given.Folder, $"us_127.0.7.{i}_*.log")));
            Assert.Equal((seed, 4 + Length(seed), Length(seed + 1)), (BitConverter.ToInt32(sent), sent.Length, answered.Length));
            new Pattern(seed).Check(0, sent.AsSpan(4));
            new Pattern(-seed).Check(0, answered);
        }

        static int Length(int seed) => seed % 10 * 60_000; // none at all, up to half a megabyte
    }

    [Fact(Timeout = Quick)]
    public async Task Those_who_begin_in_one_second_have_files_of_their_own()
    {
        const int Count = 30;
        string folder = Directory.CreateDirectory(Given.Path("here")).FullName;
        for (int second = 0; second < 30; second++)
        {
            File.WriteAllText(Path.Combine(folder, $"ds_127.0.0.1_{DateTime.UtcNow.AddSeconds(second):yyyyMMddHHmmss}.log"), "not ours");
        }

        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--record", folder);
        await Wait.Many(Count, 10, async i =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            await client.Ask($"this is {i:00}");
        });
        await proxy.Stop();
        List<string> recorded = [.. Directory.GetFiles(folder, "ds_*").Select(File.ReadAllText).Where(t => t != "not ours").Order(StringComparer.Ordinal)];
        Assert.Equal(Enumerable.Range(0, Count).Select(i => $"this is {i:00}"), recorded);
        Assert.Equal(30 + Count, Directory.GetFiles(folder, "ds_*").Length);
        foreach (string answer in Directory.GetFiles(folder, "us_*"))
        {
            Assert.Matches(@"^us_127\.0\.0\.1_\d{14}_\d+\.log$", Path.GetFileName(answer));
            Assert.Equal(File.ReadAllText(answer.Replace("us_", "ds_", StringComparison.Ordinal)), File.ReadAllText(answer));
        }

        Assert.Equal(Count, Directory.GetFiles(folder, "us_*").Length);
    }

    [Fact(Timeout = Quick)]
    public async Task What_came_before_a_reset_is_recorded()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--record", Given.Folder, "--drain-timeout", "100ms");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Exchange(server, "before", "it");
        client.Reset();
        await server.ExpectReset();
        Assert.Equal("client reset", (await proxy.Connection()).Reason);
        await Wait.Until(() => Directory.GetFiles(Given.Folder, "*.log").Sum(f => new FileInfo(f).Length) == 8, "both files");
        Assert.Equal("before", Recorded("ds_127.0.0.1_"));
        Assert.Equal("it", Recorded("us_127.0.0.1_"));
    }

    [Fact(Timeout = Quick)]
    public async Task The_built_in_servers_are_recorded_and_no_descriptor_stays()
    {
        ProxyProcess proxy = await Given.Proxy(
            "--record", Given.Folder, "--drain-timeout", "100ms", "-l", "127.0.0.1:0", "-u", "discard", "-l", "127.0.0.1:0", "-u", "echo");
        await (await Given.Client(proxy, 1)).Ask("warm");
        await Wait.Until(() => Directory.GetFiles(Given.Folder, "us_*").Sum(f => new FileInfo(f).Length) == 4, "both files of the first");
        int before = proxy.Descriptors;
        for (int i = 0; i < 20; i++)
        {
            Peer client = await Given.Client(proxy, i % 2);
            await client.Send("dropped, or not");
            client.Finish();
            await client.ReceiveToEnd();
        }

        await Given.Client(await Peer.Connect(proxy.Endpoint())).Send(""); // says nothing, leaves nothing
        await Wait.Until(() => proxy.Descriptors <= before + 1 + Tool.LateFiles, "all files to be closed");
        await proxy.Stop();
        Assert.Equal(21, Directory.GetFiles(Given.Folder, "ds_*").Length);
        Assert.Equal(10 * "dropped, or not".Length + 4, Directory.GetFiles(Given.Folder, "us_*").Sum(f => new FileInfo(f).Length)); // echo's
    }

    [Fact(Timeout = Quick)]
    public async Task Addresses_become_names_that_stay_in_the_directory()
    {
        string folder = Directory.CreateDirectory(Given.Path("here")).FullName;
        ProxyProcess proxy = await Given.Proxy(
            "--record", folder, "--drain-timeout", "100ms", "-l", "[::1]:0", "-u", "echo", "-l", $"unix:{Given.Path("socket")}", "-u", "echo",
            "-l", "127.0.0.1:0", "-u", "echo", "--accept-proxy", "127.0.0.1");
        await Say(0, [], "six");
        await Say(1, [], "unix");
        await Say(2, Header("../../../evil", "/x"), "path");
        await Say(2, "PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n"u8.ToArray(), "four");
        await Say(2, "PROXY TCP6 2001:db8::7 2001:db8::8 1 2\r\n"u8.ToArray(), "seven");
        await Say(2, "PROXY TCP6 ::ffff:192.0.2.9 ::1 1 2\r\n"u8.ToArray(), "mapped");
        await proxy.Stop();
        Assert.Equal(
            ["--1 six", "192.0.2.7 four", "192.0.2.9 mapped", "2001-db8--7 seven", "unix path", "unix unix"],
            Directory.GetFiles(folder, "ds_*").Select(f => $"{Path.GetFileName(f).Split('_')[1]} {File.ReadAllText(f)}").Order(StringComparer.Ordinal));
        Assert.Equal(["here", "proxy0"], Directory.GetFileSystemEntries(Given.Folder).Select(Path.GetFileName).Order(StringComparer.Ordinal));

        async Task Say(int listen, byte[] header, string text)
        {
            Peer client = await Given.Client(proxy, listen);
            await client.Send(header);
            await client.Ask(text);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_directory_that_cannot_be_written_to_is_one_line_and_nothing_starts()
    {
        string file = Given.Write("file", "");
        foreach ((string folder, string reason) in new[] { (Given.Path("nowhere"), "no such file or directory"), (file, "no") })
        {
            Outcome outcome = await Tool.Proxy("127.0.0.1:0", "echo", "--record", folder);
            string line = Assert.Single(outcome.ErrLines);
            Assert.StartsWith($"tcpproxy: error: --record: cannot write to {folder}: {reason}", line, StringComparison.Ordinal);
            Assert.Equal(1, outcome.Status);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_full_disk_ends_the_recording_once_and_no_connection()
    {
        const int Length = 8 << 20;
        string folder = await Mount("-t", "tmpfs", "-o", "size=256k", "none");
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--record", folder, "--drain-timeout", "100ms");
        for (int i = 0; i < 3; i++)
        {
            (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
            Task sending = client.Send(new Pattern(i), Length);
            await server.Receive(new Pattern(i), Length);
            await sending;
            client.Finish();
            await server.ExpectEnd();
            server.Dispose();
            await client.ExpectEnd();
            Assert.Equal("--", (await proxy.Connection(client)).End);
        }

        LogLine line = await proxy.Tolerate("record").Line("record");
        Assert.Matches(@"^127\.0\.0\.1:\d+ is not recorded any more: No space left on device", line["message"]);
        Assert.Equal(("warn", $"127.0.0.1:0"), (line.Level, line["route"]));
        Assert.Equal(0, await proxy.Stop());
        Assert.Single(proxy.Lines, l => l.Event == "record");
        byte[] recorded = File.ReadAllBytes(Directory.GetFiles(folder, "ds_*").Order(StringComparer.Ordinal).First());
        Assert.InRange(recorded.Length, 1, 256 << 10);
        new Pattern(0).Check(0, recorded);
    }

    [Fact(Timeout = Slow)]
    public async Task A_disk_that_hangs_holds_a_connection_up_for_five_seconds_and_the_process_goes_on()
    {
        const int Length = 32 << 20;
        string image = Given.Path("image");
        string mkfs = Tool.Need("mkfs.ext4", "e2fsprogs");
        string fsfreeze = Tool.Need("fsfreeze", "util-linux");
        (await Tool.Run("truncate", "-s", "64M", image)).Good();
        (await Tool.Run(mkfs, "-q", image)).Good();
        string folder = await Mount("-o", "loop", image);
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--record", folder, "--drain-timeout", "100ms");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Exchange(server, "recorded", "too");
        await Wait.Until(() => Directory.GetFiles(folder, "us_*").Sum(f => new FileInfo(f).Length) == 3, "the first bytes");
        Assert.SkipUnless((await Tool.Run(fsfreeze, "-f", folder)).Status == 0, "fsfreeze does not work here");
        try
        {
            long start = Environment.TickCount64;
            Task sending = client.Send(new Pattern(1), Length);
            await server.Receive(new Pattern(1), Length);
            await sending;
            Assert.InRange(Environment.TickCount64 - start, 4_900, 20_000);
            Assert.Contains(" does not answer", (await proxy.Tolerate("record").Line("record"))["message"], StringComparison.Ordinal);

            start = Environment.TickCount64;
            (Peer next, Peer nextServer) = await Given.Bridge(proxy, upstream);
            sending = next.Send(new Pattern(2), Length);
            await nextServer.Receive(new Pattern(2), Length);
            await sending;
            Assert.InRange(Environment.TickCount64 - start, 0, 4_000); // nobody waits for it again
        }
        finally
        {
            (await Tool.Run(fsfreeze, "-u", folder)).Good();
        }

        Assert.Single(proxy.Lines, l => l.Event == "record");
        byte[] recorded = [];
        await Wait.Until(() => (recorded = Read(folder)).Length >= 2 << 20, "what had waited to be written");
        Assert.Equal("recorded"u8, recorded.AsSpan(0, 8));
        new Pattern(1).Check(0, recorded.AsSpan(8)); // without a hole
        (Peer last, Peer lastServer) = await Given.Bridge(proxy, upstream);
        await last.Exchange(lastServer, "again", "and again");
        await Wait.Until(() => Directory.GetFiles(folder, "us_*").Any(f => new FileInfo(f).Length == 9), "a new recording");
        await proxy.Stop();

        static byte[] Read(string folder) => File.ReadAllBytes(Directory.GetFiles(folder, "ds_*").OrderBy(f => new FileInfo(f).Length).Last());
    }

    [Fact(Timeout = Slow)]
    public async Task A_slow_disk_makes_the_sender_slow_and_loses_nothing()
    {
        const int Length = 96 << 20; // more than may wait
        string folder = await Mount("-t", "tmpfs", "-o", "size=128m", "none");
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--record", folder, "--drain-timeout", "100ms");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        Task sending = client.Send(new Pattern(1), Length);
        await server.Receive(new Pattern(1), Length);
        await sending;
        Assert.True(proxy.Resident < 80 << 20, $"{proxy.Resident} bytes resident");
        await proxy.Stop(30);
        new Pattern(1).Check(0, File.ReadAllBytes(Assert.Single(Directory.GetFiles(folder, "ds_*"))));
        Assert.Equal(Length, new FileInfo(Directory.GetFiles(folder, "ds_*")[0]).Length);
    }

    [Fact(Timeout = Quick)]
    public async Task What_was_read_before_the_server_was_chosen_is_recorded_too_but_no_header()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "--accept-proxy", "127.0.0.1", "--sni", "www.example.com", "-u", upstream.Address, "--record", Given.Folder, "--drain-timeout", "100ms");
        byte[] hello = Hello.Make("www.example.com");
        Peer client = await Given.Client(proxy);
        await client.Send((byte[])[.. "PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n"u8, .. hello]);
        Peer server = await upstream.Accept();
        await server.Receive(hello.Length);
        await client.Exchange(server, "x", "y");
        client.Dispose();
        await proxy.Stop();
        Assert.Equal([.. hello, (byte)'x'], File.ReadAllBytes(Assert.Single(Directory.GetFiles(Given.Folder, "ds_192.0.2.7_*"))));
        Assert.Equal("y", Recorded("us_192.0.2.7_"));
    }

    /// <summary>PROXY version 2, of unix sockets.</summary>
    private static byte[] Header(string source, string destination)
    {
        byte[] paths = new byte[216];
        Encoding.ASCII.GetBytes(source, paths);
        Encoding.ASCII.GetBytes(destination, paths.AsSpan(108));
        return [.. "\r\n\r\n\0\r\nQUIT\n"u8, 0x21, 0x31, 0, (byte)paths.Length, .. paths];
    }

    private string Recorded(string start) => File.ReadAllText(Assert.Single(Directory.GetFiles(Given.Folder, $"{start}*")), Encoding.Latin1);

    /// <summary>A file system of this test's own.</summary>
    private async Task<string> Mount(params string[] words)
    {
        Tool.NeedRoot("a file system of its own");
        string folder = Directory.CreateDirectory(Given.Path("mounted")).FullName;
        Outcome outcome = await Tool.Run("mount", [.. words, folder]);
        Assert.SkipWhen(outcome.Status != 0, $"mount does not work here: {outcome.Err}");
        Given.AtEnd(async () => (await Tool.Run("umount", folder)).Good());
        return folder;
    }
}
