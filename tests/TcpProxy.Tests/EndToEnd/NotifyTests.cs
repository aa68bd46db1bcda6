using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>What the proxy tells systemd, whose end of the socket the test holds.</summary>
public sealed class NotifyTests : EndToEndTest
{
    [Theory(Timeout = Quick)]
    [InlineData(false)]
    [InlineData(true)]
    public async Task It_tells_that_it_is_ready_and_that_it_stops(bool isAbstract)
    {
        Manager manager = new(Given, isAbstract);
        ProxyProcess proxy = await Given.Proxy(manager.Launch(), "-l", "127.0.0.1:0", "-u", "echo", "-l", "127.0.0.1:0", "-u", "echo");
        Assert.Equal(
            ["READY=1", $"MAINPID={proxy.Id}", "STATUS=2 routes, 0 connections"], (await manager.Next("READY=1")).Split('\n'));
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        proxy.Signal(ProxyProcess.SigTerm);
        Assert.StartsWith("STOPPING=1\n", await manager.Next("STOPPING=1"), StringComparison.Ordinal);
        client.Finish();
        await client.ExpectEnd();
        Assert.Equal(0, await proxy.Exit());
        Assert.Single(manager.Heard, m => m.StartsWith("READY=1", StringComparison.Ordinal));
    }

    [Fact(Timeout = Quick)]
    public async Task A_program_that_cannot_start_was_never_ready()
    {
        Manager manager = new(Given);
        Upstream taken = Given.Server();
        ProxyProcess proxy = await Given.Proxy(
            manager.Launch() with { AwaitReady = false, ExpectedExit = 1, Chatter = ["tcpproxy: error: "] }, taken.Address, "echo");
        Assert.Equal(1, await proxy.Exit());
        Assert.Empty(manager.Heard);
    }

    [Fact(Timeout = Quick)]
    public async Task A_reload_stands_between_its_beginning_and_ready()
    {
        Manager manager = new(Given);
        ProxyProcess proxy = await Given.Proxy(
            manager.Launch(), "127.0.0.1:0", "echo", "--deny", "@" + Given.Write("denied", "192.0.2.1\n"));
        await manager.Next("READY=1");
        long before = Microseconds();
        proxy.Signal(ProxyProcess.SigHup);
        string[] reloading = (await manager.Next("RELOADING=1")).Split('\n');
        Assert.Equal("RELOADING=1", reloading[0]);
        string monotonic = Assert.Single(reloading, l => l.StartsWith("MONOTONIC_USEC=", StringComparison.Ordinal));
        Assert.InRange(long.Parse(monotonic["MONOTONIC_USEC=".Length..], CultureInfo.InvariantCulture), before, Microseconds());
        await manager.Next("READY=1", 2);

        static long Microseconds() => Stopwatch.GetTimestamp() / (Stopwatch.Frequency / 1_000_000);
    }

    [Fact(Timeout = Quick)]
    public async Task The_status_follows_the_connections()
    {
        Manager manager = new(Given);
        ProxyProcess proxy = await Given.Proxy(manager.Launch(), "127.0.0.1:0", "echo");
        List<Peer> clients = [];
        for (int i = 0; i < 3; i++)
        {
            clients.Add(await Given.Client(proxy));
            await clients[i].Ask("hello");
        }

        await manager.Next("STATUS=1 route, 3 connections");
        clients.ForEach(c => c.Dispose());
        await manager.Next("STATUS=1 route, 0 connections");
    }

    [Theory(Timeout = Quick)]
    [InlineData("2m", "125000000")]
    [InlineData("off", "315360000000000")] // ten years
    public async Task While_it_drains_the_status_says_so(string time, string told)
    {
        Manager manager = new(Given);
        ProxyProcess proxy = await Given.Proxy(manager.Launch(), "127.0.0.1:0", "echo", "--drain-timeout", time);
        Peer[] clients = [await Given.Client(proxy), await Given.Client(proxy)];
        foreach (Peer client in clients)
        {
            await client.Ask("hello");
        }

        proxy.Signal(ProxyProcess.SigTerm);
        Assert.Equal(
            ["STOPPING=1", "STATUS=draining, 2 connections", $"EXTEND_TIMEOUT_USEC={told}"],
            (await manager.Next("STOPPING=1")).Split('\n'));
        clients[0].Dispose();
        await manager.Next("STATUS=draining, 1 connection");
        clients[1].Finish();
        await clients[1].ExpectEnd();
        Assert.Equal(0, await proxy.Exit());
    }

    /// <summary>systemd would give it the time of a stop.</summary>
    [Fact(Timeout = Quick)]
    public async Task The_one_connection_of_once_is_no_stop()
    {
        Manager manager = new(Given);
        ProxyProcess proxy = await Given.Proxy(manager.Launch(), "127.0.0.1:0", "echo", "--once");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        Assert.Equal(0, await proxy.Exit());
        await manager.Next("READY=1");
        Assert.DoesNotContain(manager.Heard, m => m.StartsWith("STOPPING=1", StringComparison.Ordinal));
    }

    [Fact(Timeout = Quick)]
    public async Task The_watchdog_is_fed_twice_in_its_time()
    {
        Manager manager = new(Given);
        await Given.Proxy(manager.Launch(watchdog: 1_000_000), "127.0.0.1:0", "echo");
        await manager.Next("WATCHDOG=1", 2);
        Stopwatch clock = Stopwatch.StartNew();
        await manager.Next("WATCHDOG=1", 12);
        Assert.InRange(clock.ElapsedMilliseconds, 10 * 300, 10 * 600); // 375 to 500 ms each
    }

    [Fact(Timeout = Quick)]
    public async Task The_watchdog_of_another_process_is_not_ours_to_feed()
    {
        Manager manager = new(Given);
        Launch launch = manager.Launch(watchdog: 100_000);
        launch.Environment["WATCHDOG_PID"] = "1";
        await Given.Proxy(launch, "127.0.0.1:0", "echo");
        await manager.Next("READY=1");
        await Wait.Pause(500);
        Assert.DoesNotContain("WATCHDOG=1", manager.Heard);
    }

    [Theory(Timeout = Quick)]
    [InlineData(".NET Sockets")]
    [InlineData("sweep")]
    public async Task A_thread_that_hangs_starves_the_watchdog(string name)
    {
        Tool.NeedLibc("no event loop is asked");
        Manager manager = new(Given);
        ProxyProcess proxy = await Given.Proxy(manager.Launch(watchdog: 400_000), "127.0.0.1:0", "echo", "--threads", "2");
        await manager.Next("WATCHDOG=1");
        string[] threads = [.. Directory.GetDirectories($"/proc/{proxy.Id}/task")
            .Where(t => File.ReadAllText($"{t}/comm").Trim() == name).Select(t => Path.GetFileName(t))];
        Assert.Equal(name == "sweep" ? 1 : 2, threads.Length);
        foreach (string thread in threads)
        {
            int before = 0;
            int during = 0;
            Held.While(int.Parse(thread, CultureInfo.InvariantCulture), () =>
            {
                Thread.Sleep(300); // what was on its way
                before = manager.Heard.Count;
                Thread.Sleep(1_000);
                during = manager.Heard.Count - before;
            });
            Assert.True(during == 0, $"{during} messages while thread {thread} was held");
            await manager.Next("WATCHDOG=1", manager.Heard.Count(m => m == "WATCHDOG=1") + 2);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_manager_who_is_behind_still_hears_that_it_is_ready()
    {
        Manager manager = new(Given, reads: false);
        int filled = manager.Fill();
        ProxyProcess proxy = await Given.Proxy(manager.Launch(), "127.0.0.1:0", "echo");
        await Wait.Pause(200);
        manager.Read();
        await manager.Next("READY=1");
        Assert.True(filled > 0 && !proxy.HasExited);
    }

    [Fact(Timeout = Quick)]
    public async Task A_manager_who_has_gone_harms_nobody()
    {
        Launch launch = new() { Environment = { ["NOTIFY_SOCKET"] = Given.Path("gone"), ["WATCHDOG_USEC"] = "100000" } };
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", "echo");
        await Wait.Pause(300);
        await (await Given.Client(proxy)).Ask("hello");
    }

    [Theory(Timeout = Quick)]
    [InlineData("")]
    [InlineData("@")]
    [InlineData("relative")]
    [InlineData("/" + "longlonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglonglong")]
    public async Task A_strange_address_is_no_manager(string address)
    {
        Launch launch = new() { Environment = { ["NOTIFY_SOCKET"] = address, ["WATCHDOG_USEC"] = "x" } };
        await (await Given.Client(await Given.Proxy(launch, "127.0.0.1:0", "echo"))).Ask("hello");
    }

    [Fact(Timeout = Quick)]
    public async Task Filters_do_not_inherit_the_manager()
    {
        Tool.NeedLibc("filters");
        Manager manager = new(Given);
        ProxyProcess proxy = await Given.Proxy(manager.Launch(watchdog: 30_000_000), "127.0.0.1:0", "discard",
            "--filter-down", "cat", "--filter-up", "sh:env >" + Given.Path("env") + "; cat");
        Peer client = await Given.Client(proxy);
        await client.Send("hello");
        await Wait.Until(() => File.Exists(Given.Path("env")) && new FileInfo(Given.Path("env")).Length > 0, "the filter");
        Assert.DoesNotMatch("NOTIFY_SOCKET|WATCHDOG", File.ReadAllText(Given.Path("env")));
        client.Finish();
    }

    /// <summary>The service manager's end.</summary>
    private sealed class Manager
    {
        private readonly Socket _socket = new(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified);
        private readonly List<string> _heard = [];
        private readonly string _address;

        public Manager(Given given, bool isAbstract = false, bool reads = true)
        {
            _address = isAbstract ? $"@tcpproxy-test-{Guid.NewGuid():N}" : given.Path("notify");
            _socket.Bind(EndPoint);
            given.Owned(_socket);
            if (reads)
            {
                Read();
            }
        }

        public List<string> Heard
        {
            get
            {
                lock (_heard)
                {
                    return [.. _heard];
                }
            }
        }

        private UnixDomainSocketEndPoint EndPoint => new(_address.Replace('@', '\0'));

        public Launch Launch(long watchdog = 0)
        {
            Launch launch = new() { Environment = { ["NOTIFY_SOCKET"] = _address } };
            if (watchdog > 0)
            {
                launch.Environment["WATCHDOG_USEC"] = watchdog.ToString(CultureInfo.InvariantCulture);
            }

            return launch;
        }

        public void Read() => _ = Wait.Apart(async () =>
        {
            byte[] bytes = new byte[4096];
            while (true)
            {
                int length = await _socket.ReceiveAsync(bytes);
                lock (_heard)
                {
                    _heard.Add(Encoding.UTF8.GetString(bytes, 0, length));
                }
            }
        });

        /// <summary>Until no further message is taken.</summary>
        public int Fill()
        {
            using Socket sender = new(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified);
            sender.Blocking = false;
            for (int i = 0; ; i++)
            {
                try
                {
                    sender.SendTo("X=1"u8, EndPoint);
                }
                catch (SocketException e) when (e.SocketErrorCode == SocketError.WouldBlock)
                {
                    return i;
                }
            }
        }

        /// <summary>The first message with that line, or the n-th.</summary>
        public async Task<string> Next(string line, int number = 1)
        {
            string? found = null;
            await Wait.Until(
                () => (found = Heard.Where(m => m.Split('\n').Contains(line)).ElementAtOrDefault(number - 1)) is not null,
                $"message {number} with {line}");
            return found!;
        }
    }

    /// <summary>Stops one thread of another process, as a debugger does.</summary>
    private static class Held
    {
        private const int Attach = 16; // PTRACE_ATTACH
        private const int Detach = 17;

        public static void While(int thread, Action action)
        {
            Exception? failure = null;
            Thread tracer = new(() =>
            {
                try
                {
                    // the same thread must do all of it
                    Check(ptrace(Attach, thread, 0, 0));
                    Assert.Equal(thread, waitpid(thread, out _, 0x40000000)); // __WALL
                    action();
                    Check(ptrace(Detach, thread, 0, 0));
                }
                catch (Exception e)
                {
                    failure = e;
                }
            });
            tracer.Start();
            tracer.Join();
            Assert.Null(failure);
        }

        private static void Check(nint result) =>
            Assert.True(result == 0, $"ptrace: errno {Marshal.GetLastPInvokeError()}");

        [DllImport("libc", SetLastError = true)]
        [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
        private static extern nint ptrace(nint request, nint thread, nint address, nint data);

        [DllImport("libc", SetLastError = true)]
        [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
        private static extern int waitpid(int id, out int status, int options);
    }
}
