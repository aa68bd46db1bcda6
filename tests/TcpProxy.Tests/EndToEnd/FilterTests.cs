using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.IO.Compression;
using System.Linq;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--filter-up and --filter-down: child processes in a connection.</summary>
public sealed class FilterTests : EndToEndTest
{
    protected override string? Native => "filters";

    [Fact(Timeout = Quick)]
    public async Task Each_direction_goes_through_its_own_command()
    {
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", server.Address, "--filter-up", "sed -u s/a/b/", "--filter-down", "sed -u 's/n/the n/'");
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        for (int i = 0; i < 3; i++)
        {
            await client.Send("banana\n");
            await upstream.ReceiveText("bbnana\n");
            await upstream.Send("banana\n");
            await client.ReceiveText("bathe nana\n");
        }

        client.Finish();
        await upstream.ExpectEnd();
        await upstream.Send("more\n");
        await client.ReceiveText("more\n");
        upstream.Finish();
        await client.ExpectEnd();
        Assert.Equal("done", (await proxy.Connection(client)).Reason);
        await NothingIsLeft(proxy);
    }

    [Fact(Timeout = Quick)]
    public async Task What_gzip_makes_of_one_direction_is_the_original_when_unpacked()
    {
        byte[] data = new byte[3_000_000];
        new Pattern(1).Fill(0, data);
        data.AsSpan(1_000_000, 1_000_000).Clear(); // something to pack
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", server.Address, "--filter-up", "gzip -c");
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        Task<byte[]> receiving = upstream.ReceiveToEnd();
        await client.Send(data);
        client.Finish();
        byte[] packed = await receiving;
        Assert.InRange(packed.Length, 1, data.Length - 900_000);
        using GZipStream unpacking = new(new MemoryStream(packed), CompressionMode.Decompress);
        using MemoryStream unpacked = new();
        await unpacking.CopyToAsync(unpacked, TestContext.Current.CancellationToken);
        Assert.True(data.AsSpan().SequenceEqual(unpacked.ToArray()), "not the original");
        await upstream.Send("got it");
        upstream.Finish();
        Assert.Equal("got it"u8.ToArray(), await client.ReceiveToEnd());
    }

    [Fact(Timeout = Slow)]
    public async Task Much_goes_both_ways_through_cat_unaltered()
    {
        const long Length = 50_000_000;
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", server.Address, "--filter-up", "cat", "--filter-down", "cat");
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        await Task.WhenAll(
            Wait.Apart(() => client.Send(new Pattern(1), Length)),
            Wait.Apart(() => upstream.Receive(new Pattern(1), Length)),
            Wait.Apart(() => upstream.Send(new Pattern(2), Length)),
            Wait.Apart(() => client.Receive(new Pattern(2), Length)));
        client.Finish();
        upstream.Finish();
        await client.ExpectEnd();
        await upstream.ExpectEnd();
        Assert.Equal("done", (await proxy.Connection(client)).Reason);
    }

    [Fact(Timeout = Slow)]
    public async Task Two_hundred_connections_have_their_own_children_at_once_and_nothing_of_them_stays()
    {
        const int Count = 200;
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--filter-up", "sed -u s/a/b/", "--filter-down", "cat");
        await (await Given.Client(proxy)).Ask("x\n");
        int before = proxy.Descriptors - Children(proxy).Count * 2; // of that one: a child has two sockets
        Peer[] clients = new Peer[Count];
        for (int i = 0; i < Count; i++)
        {
            clients[i] = await Given.Client(proxy);
        }

        await Wait.Many(Count, 50, async i =>
        {
            await clients[i].Send($"banana {i}\n");
            await clients[i].ReceiveText($"bbnana {i}\n");
        });
        Assert.Equal(2 * (Count + 1), Children(proxy).Count);
        await Wait.Many(Count, 50, async i =>
        {
            if (i % 2 == 0)
            {
                clients[i].Finish();
                await clients[i].ExpectEnd();
            }
            else
            {
                clients[i].Reset();
            }
        });
        await Wait.Until(() => Children(proxy).Count == 2, "the end of all children but the first two");
        await Wait.Until(() => proxy.Descriptors <= before + 4, $"{before} descriptors, not {proxy.Descriptors}");
    }

    [Fact(Timeout = Quick)]
    public async Task A_shell_runs_what_is_written_for_one()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--filter-up", "sh:sort | tr a-z A-Z", "--filter-down", "sh:sed 's/$/!/'");
        Peer client = await Given.Client(proxy);
        await client.Send("b\na\nc\n");
        client.Finish();
        Assert.Equal("A!\nB!\nC!\n", Encoding.UTF8.GetString(await client.ReceiveToEnd()));
        await NothingIsLeft(proxy);
    }

    [Fact(Timeout = Quick)]
    public async Task Filters_work_in_the_order_of_their_options()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--filter-up", "sed -u s/a/b/", "--filter-up", "sed -u s/b/c/", "--filter-up", "cat");
        Peer client = await Given.Client(proxy);
        await client.Send("a b\n");
        await client.ReceiveText("c b\n");
        client.Finish();
        await client.ExpectEnd();
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_in_a_file_keeps_its_quotes()
    {
        string file = Given.Write("conf", "listen 127.0.0.1:0\nupstream echo\nfilter-up sed -u 's/a b/\\//' # slash\n");
        ProxyProcess proxy = await Given.Proxy("--config", file);
        Peer client = await Given.Client(proxy);
        await client.Send("a b\n");
        await client.ReceiveText("/\n");
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_may_say_the_first_word()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--filter-up", "sh:echo hello; exec cat");
        Peer client = await Given.Client(proxy);
        await client.ReceiveText("hello\n");
        await client.Ask("there\n");
    }

    [Fact(Timeout = Quick)]
    public async Task The_end_of_a_command_in_good_order_is_a_fin_and_what_comes_after_it_is_dropped()
    {
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", server.Address, "--filter-up", "head -c 3");
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        await client.Send("banana");
        Assert.Equal("ban"u8.ToArray(), await upstream.ReceiveToEnd());
        await client.Send(new Pattern(1), 20_000_000); // nobody reads it, and nothing waits for that
        await upstream.Send("enough");
        await client.ReceiveText("enough");
        upstream.Finish();
        await client.ExpectEnd();
        client.Finish();
        LogLine line = await proxy.Connection(client);
        Assert.Equal("done", line.Reason);
        Assert.Equal(20_000_006, line.BytesUp);
        await NothingIsLeft(proxy);
    }

    [Fact(Timeout = Quick)]
    public async Task After_an_early_end_the_server_gets_its_fin_even_when_it_has_finished_before()
    {
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", server.Address, "--filter-up", "head -c 3");
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        upstream.Finish();
        await client.ExpectEnd();
        await client.Send("banana"); // and no FIN
        Assert.Equal("ban"u8.ToArray(), await upstream.ReceiveToEnd());
    }

    [Theory(Timeout = Quick)]
    [InlineData("sh:head -c 3; exit 3", "filter exited with status 3")]
    [InlineData("sh:read x; kill -TERM $$", "filter killed by signal 15")]
    [InlineData("sh:read x; kill -PIPE $$", "filter killed by signal 13")] // which the proxy itself ignores
    [InlineData("grep nothing-of-it", "filter exited with status 1")]
    public async Task Any_other_end_resets_both_sides(string command, string reason)
    {
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", server.Address, "--filter-up", command);
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        await client.Send("banana\n");
        if (command.StartsWith("grep", StringComparison.Ordinal))
        {
            client.Finish();
        }

        await upstream.ExpectReset();
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(reason, line.Reason);
        Assert.Equal("PD", line.End);
        await NothingIsLeft(proxy);
    }

    [Fact(Timeout = Quick)]
    public async Task The_status_is_known_where_the_proxy_was_started_with_SIGCHLD_ignored()
    {
        Launch launch = new()
        {
            Before = ["python3", "-c", "import os, signal, sys; "
            + "signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"]
        };
        Tool.Need("python3", "python3");
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", "echo", "--filter-up", "sh:exit 3");
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        Assert.Equal("filter exited with status 3", (await proxy.Connection(client)).Reason);
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_that_never_reads_holds_its_client_and_nothing_else()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--filter-up", "sleep 1000");
        Peer client = await Given.Client(proxy);
        byte[] chunk = new byte[1 << 20];
        long sent = 0;
        Task<int> sending;
        while (await Task.WhenAny(sending = client.SendSome(chunk), Wait.Pause(500)) == sending)
        {
            sent += await sending;
            Assert.True(sent < 30_000_000, "somebody takes it all");
        }

        Assert.InRange(proxy.Resident, 0, 40_000_000);
        Peer other = await Given.Client(proxy);
        await Wait.Until(() => Children(proxy).Count == 2, "a child for the other");
        other.Reset();
        client.Reset();
        await NothingIsLeft(proxy);
        Assert.Equal("client reset", (await proxy.Connection()).Reason);
        _ = sending.ContinueWith(t => t.Exception, TaskScheduler.Default);
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_that_does_not_end_is_killed_with_its_group_after_the_fin_timeout()
    {
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", server.Address, "--filter-up", "sh:sleep 987 & echo $!; read x; echo $x; wait", "--fin-timeout", "1s");
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        int grandchild = int.Parse(await upstream.ReceiveLine(), CultureInfo.InvariantCulture);
        await Wait.Pause(1500); // which is no time for the timeout: the client has not finished
        await client.Send("hello\n");
        await upstream.ReceiveText("hello\n");
        Assert.NotEmpty(Children(proxy));
        long start = Environment.TickCount64;
        client.Finish();
        await client.ExpectReset();
        Assert.InRange(Environment.TickCount64 - start, 900, 10_000);
        LogLine line = await proxy.Connection(client);
        Assert.Equal("filter fin timeout", line.Reason);
        Assert.Equal("PD", line.End);
        await NothingIsLeft(proxy);
        await Wait.Until(() => IsGone(grandchild), "the end of the grandchild");
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_that_goes_on_writing_is_not_killed_by_the_fin_timeout()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--fin-timeout", "2s", "--filter-up",
            "sh:cat; for i in 1 2 3 4 5 6 7 8; do sleep 0.6; echo $i; done");
        Peer client = await Given.Client(proxy);
        client.Finish();
        Assert.Equal("1\n2\n3\n4\n5\n6\n7\n8\n", Encoding.UTF8.GetString(await client.ReceiveToEnd()));
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_that_cannot_write_is_not_taken_for_hung()
    {
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", server.Address, "--filter-up", "head -c 30000000 /dev/zero", "--fin-timeout", "1s");
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        client.Finish();
        await Wait.Pause(3000); // the server does not read
        Assert.Equal(30_000_000, (await upstream.ReceiveToEnd()).Length);
        upstream.Finish();
        await client.ExpectEnd();
        Assert.Equal("done", (await proxy.Connection(client)).Reason);
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_that_writes_for_ever_ends_when_the_client_leaves()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--filter-up", "yes");
        Peer other = await Given.Client(proxy);
        Peer client = await Given.Client(proxy);
        byte[] buffer = new byte[1 << 20];
        for (int got = 0; got < 100_000_000;)
        {
            got += await client.ReceiveSome(buffer);
        }

        client.Reset();
        other.Reset();
        await NothingIsLeft(proxy);
        Assert.InRange(proxy.Resident, 0, 40_000_000);
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_may_read_all_before_it_writes_and_write_more_than_it_reads()
    {
        string lines = string.Concat(Enumerable.Range(0, 200_000).Select(i => $"line {(i * 7919) % 200_000:d6}\n"));
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--filter-up", "sort", "--filter-down", "sed 'p;p;p;p;p;p;p;p;p'");
        Peer client = await Given.Client(proxy);
        Task<byte[]> receiving = client.ReceiveToEnd(60);
        await client.Send(lines);
        client.Finish();
        byte[] got = await receiving;
        Assert.Equal(10 * lines.Length, got.Length);
        string first = string.Concat(Enumerable.Repeat("line 000000\n", 10)) + "line 000001\n";
        Assert.StartsWith(first, Encoding.UTF8.GetString(got, 0, 200));
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_knows_the_connection_and_nothing_of_the_runtime()
    {
        Upstream server = Given.Server();
        Launch launch = new() { Environment = { ["MINE"] = "a b", ["TCPPROXY_CLIENT"] = "old" } };
        ProxyProcess proxy = await Given.Proxy(
            launch, "127.0.0.1:0", server.Address, "--name", "front door", "--filter-up", "env", "--threads", "2");
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        string[] environment = Encoding.UTF8.GetString(await upstream.ReceiveToEnd()).Split('\n');
        Assert.Contains($"TCPPROXY_CLIENT={client.Local}", environment);
        Assert.Contains($"TCPPROXY_UPSTREAM={server.Address}", environment);
        Assert.Contains("TCPPROXY_ROUTE=front door", environment);
        Assert.Contains("MINE=a b", environment);
        Assert.Single(environment, line => line.StartsWith("TCPPROXY_CLIENT=", StringComparison.Ordinal));
        Assert.DoesNotContain(environment, line => line.StartsWith("DOTNET_SYSTEM_NET", StringComparison.Ordinal));
    }

    [Fact(Timeout = Quick)]
    public async Task A_command_inherits_no_descriptor_and_no_ignored_or_blocked_signal()
    {
        Launch launch = Launch.FromShell("exec 7</dev/null 8<&0; trap '' HUP");
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", "echo", "--filter-up", "cat", "--filter-down", "cat");
        for (int i = 0; i < 3; i++)
        {
            await (await Given.Client(proxy)).Ask("x\n");
        }

        Assert.Equal(6, Children(proxy).Count);
        foreach (int child in Children(proxy))
        {
            Assert.Equal(["0", "1", "2"], Directory.GetFiles($"/proc/{child}/fd").Select(Path.GetFileName).Order());
            string[] status = File.ReadAllLines($"/proc/{child}/status");
            Assert.Contains("SigIgn:\t0000000000000000", status);
            Assert.Contains("SigBlk:\t0000000000000000", status);
            Assert.Equal(child.ToString(CultureInfo.InvariantCulture), Stat(child)[2]); // its process group
        }
    }

    [Fact(Timeout = Quick)]
    public async Task What_a_command_says_on_stderr_is_logged_escaped_and_bounded()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--name", "r", "--filter-up",
            "sh:printf 'a \\033[1m\"b\"\\377\\r\\nno end' >&2; sleep 1.1; seq 100000 >&2; cat");
        proxy.Tolerate("filter");
        Peer client = await Given.Client(proxy);
        await client.Ask("still there\n");
        client.Finish();
        await client.ExpectEnd();
        await proxy.Connection(client);
        LogLine line = await proxy.Line("filter");
        Assert.Equal($"{client.Local}: a \u001b[1m\"b\"\ufffd\r\nno end", line["message"]);
        Assert.Equal("warn", line.Level);
        Assert.Equal("r", line["route"]);
        await proxy.Line("filter", l => l["message"] == $"{client.Local}: what else it says in this second is left out");
        Assert.InRange(proxy.Lines.Count(l => l.Event == "filter"), 10, 100);
        Assert.DoesNotContain('\u001b', proxy.RawLog);
    }

    [Fact(Timeout = Quick)]
    public async Task A_quota_holds_before_a_filter()
    {
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", server.Address, "--max-bytes-up", "5", "--filter-up", "sed s/b/BB/");
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        await client.Send("banana");
        Assert.Equal("BBanan"u8.ToArray(), await upstream.ReceiveToEnd());
        Assert.Equal("byte quota up", (await proxy.Connection(client)).Reason);
    }

    [Fact(Timeout = Quick)]
    public async Task A_program_that_has_vanished_resets_the_connection_and_is_missed_by_that_only()
    {
        string program = Given.Path("my cat");
        File.CreateSymbolicLink(program, "/bin/cat"); // a copy may be open for writing in a child that another test forks
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "echo", "--filter-up", $"'{program}'");
        await (await Given.Client(proxy)).Ask("x\n");
        File.Delete(program);
        Peer client = await Given.Client(proxy);
        await client.ExpectReset();
        LogLine line = await proxy.Connection(client);
        Assert.Equal("filter not started: No such file or directory", line.Reason);
        File.CreateSymbolicLink(program, "/bin/cat");
        await (await Given.Client(proxy)).Ask("x\n");
    }

    [Fact(Timeout = Quick)]
    public async Task A_reset_while_the_last_of_a_filter_waits_for_a_capture_costs_no_processor_time()
    {
        const int Length = 3_500_000; // so much that the capture's buffer is full, and all the same the client can finish
        string pipe = Given.Path("pipe");
        (await Tool.Run("mkfifo", pipe)).Good();
        Task<FileStream> opening = Wait.Apart(() => Task.FromResult(new FileStream(pipe, FileMode.Open, FileAccess.Read, FileShare.ReadWrite, 0)));
        Launch launch = Launch.FromShell(streams: $">{pipe}");
        Upstream server = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            launch, "127.0.0.1:0", server.Address, "--threads", "1", "--filter-up", "cat", "--pcap", "-");
        FileStream reader = Given.Owned(await opening);
        (Peer client, Peer upstream) = await Given.Bridge(proxy, server);
        long received = 0;
        Task draining = Wait.Apart(async () =>
        {
            byte[] buffer = new byte[1 << 16];
            await Record.ExceptionAsync(async () =>
            {
                for (int count; (count = await upstream.ReceiveSome(buffer)) > 0;)
                {
                    Interlocked.Add(ref received, count);
                }
            });
        });
        await client.Send(new Pattern(1), Length);
        client.Finish();
        Assert.InRange(await Wait.UntilStill(() => Interlocked.Read(ref received), "the capture is full"), 1, Length - 1);
        upstream.Reset();
        await draining;
        await client.ExpectReset(); // the proxy knows
        double before = proxy.Processor;
        await Wait.Pause(1_000); // less than the capture's patience
        Assert.InRange(proxy.Processor - before, 0, 300);
        _ = Wait.Apart(() => reader.CopyToAsync(Stream.Null, TestContext.Current.CancellationToken));
        Task<Peer> accepted = server.Accept();
        Peer second = await Given.Client(proxy);
        await second.Send("hello");
        await (await accepted.Within("the second client's connection", 5)).ReceiveText("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task Without_descriptors_for_a_child_the_proxy_goes_on()
    {
        ProxyProcess proxy = await Given.Proxy(
            Launch.WithDescriptors(48), "127.0.0.1:0", "echo", "--filter-up", "cat");
        proxy.Tolerate("exhausted", "recovered");
        Peer[] clients = new Peer[40];
        for (int i = 0; i < clients.Length; i++)
        {
            clients[i] = await Given.Client(proxy);
        }

        await proxy.Connection(l => l.Reason is "out of descriptors" or "filter not started: Too many open files");
        Array.ForEach(clients, c => c.Reset());
        await NothingIsLeft(proxy);
        await (await Given.Client(proxy)).Ask("x\n");
    }

    [Fact(Timeout = Quick)]
    public async Task Nothing_of_a_command_outlives_the_proxy()
    {
        ProxyProcess proxy = await Given.Proxy(
            "127.0.0.1:0", "echo", "--filter-up", "sh:sleep 986 & echo $!; wait", "--drain-timeout", "300ms");
        List<int> processes = [];
        for (int i = 0; i < 5; i++)
        {
            processes.Add(int.Parse(await (await Given.Client(proxy)).ReceiveLine(), CultureInfo.InvariantCulture));
        }

        processes.AddRange(Children(proxy));
        Assert.Equal(10, processes.Count);
        Assert.DoesNotContain(processes, IsGone);
        Assert.Equal(0, await proxy.Stop());
        await Wait.Until(() => processes.TrueForAll(IsGone), "the end of all of them");
    }

    [Theory(Timeout = Quick)]
    [InlineData("no-such-program x", 1, "--filter-up: there is no program 'no-such-program'")]
    [InlineData("./no-such-program x", 1, "--filter-up: there is no program './no-such-program'")]
    [InlineData("/tmp", 1, "--filter-up: there is no program '/tmp'")]
    [InlineData("sed 's/a/b", 2, "--filter-up: a quote (') is not closed")]
    [InlineData("sed \\", 2, "--filter-up: nothing follows the last backslash")]
    [InlineData(" ", 2, "--filter-up: names no command")]
    [InlineData("sh: ", 2, "--filter-up: names no command")]
    [InlineData("'' x", 2, "--filter-up: names no command")]
    public async Task A_wrong_command_is_said_at_the_start(string command, int status, string message)
    {
        Outcome outcome = await Tool.Proxy("127.0.0.1:0", "echo", "-q", "--filter-up", command);
        Assert.Equal(status, outcome.Status);
        Assert.Equal($"tcpproxy: error: {message}\n", outcome.Err);
    }

    [Fact(Timeout = Quick)]
    public async Task Where_there_is_no_Linux_the_option_is_refused()
    {
        Outcome outcome = await Tool.Run(
            "env", "TCPPROXY_PORTABLE=1", ProxyProcess.Binary, "127.0.0.1:0", "echo", "--filter-down", "cat");
        Assert.Equal(2, outcome.Status);
        Assert.Equal("tcpproxy: error: --filter-down: works on Linux only\n", outcome.Err);
    }

    private static Task NothingIsLeft(ProxyProcess proxy) =>
        Wait.Until(() => Children(proxy).Count == 0, "the end of all children, none of them a zombie");

    /// <summary>Zombies are children, too.</summary>
    private static List<int> Children(ProxyProcess proxy)
    {
        string id = proxy.Id.ToString(CultureInfo.InvariantCulture);
        return [.. Directory.GetDirectories("/proc").Select(Path.GetFileName)
            .Where(name => char.IsAsciiDigit(name![0])).Select(name => int.Parse(name!, CultureInfo.InvariantCulture))
            .Where(process => Stat(process) is [_, var parent, ..] && parent == id)];
    }

    /// <summary>It does not run any more; who is to reap it, once the proxy has ended, is not our matter.</summary>
    private static bool IsGone(int process) => Stat(process) is not [var state, ..] || state == "Z";

    /// <summary>State, parent, process group; see proc_pid_stat(5).</summary>
    private static string[] Stat(int process)
    {
        try
        {
            string stat = File.ReadAllText($"/proc/{process}/stat");
            return stat[(stat.LastIndexOf(')') + 2)..].Split(' ');
        }
        catch (IOException)
        {
            return [];
        }
    }
}
