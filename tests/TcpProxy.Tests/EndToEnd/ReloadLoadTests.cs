using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>Reloads, and a new process in the place of the old one, while clients connect as fast as they can: none of them notices.</summary>
[Collection("heavy")]
public sealed class ReloadLoadTests : EndToEndTest
{
    private const int Connections = 50_000;
    private const int Reloads = 100;

    [Fact(Timeout = Slow)]
    public async Task Of_fifty_thousand_connections_over_a_hundred_reloads_none_is_refused_reset_or_cut()
    {
        Upstream[] servers = [Given.Echo(), Given.Echo(), Given.Echo()];
        int[] extra = [.. Enumerable.Range(Given.FreePorts(Reloads), Reloads)];
        string control = Given.Path("control");
        string file = Given.Write("conf", Text(0));
        ProxyProcess proxy = (await Given.Proxy("-c", file, "-q")).Tolerate("reload");
        IPEndPoint[] listens = [(IPEndPoint)proxy.Endpoint(0), (IPEndPoint)proxy.Endpoint(1)];
        Traffic traffic = new(listens);
        Task load = traffic.Run(Connections, 64);
        int bad = 0;
        for (int i = 1; i <= Reloads; i++)
        {
            await Wait.Until(() => load.IsCompleted || traffic.Done >= i * (long)Connections / (Reloads + 1), "connections", 60);
            bool isBad = i % 10 == 7;
            DateTime written = File.GetLastWriteTimeUtc(proxy.PortFilePath);
            Given.Write("conf", Text(i) + (isBad ? "idle-timeout banana\n" : string.Empty));
            proxy.Signal(ProxyProcess.SigHup);
            if (isBad)
            {
                await proxy.LinesOf("reload", ++bad);
            }
            else
            {
                await Wait.Until(() => File.GetLastWriteTimeUtc(proxy.PortFilePath) != written, "a reload");
            }
        }

        await load.Within("all connections", 120);
        traffic.Check();

        // what was counted is what clients have counted, through all routes and servers that there were
        for (int i = 0; (await Told("scur")).Any(count => count != 0); i++)
        {
            Assert.True(i < 100, "connections that do not end");
            await Wait.Pause(50);
        }

        long[] accepted = await Told("stot");
        long[] bytes = await Told("bin");
        Assert.Equal([Connections / 2, Connections / 2], accepted);
        Assert.Equal([Connections / 2 * 32, Connections / 2 * 32], bytes);
        Assert.All(servers, server => Assert.True(server.Accepted > Connections / 20, $"{server.Accepted} of its connections"));
        TestContext.Current.TestOutputHelper?.WriteLine(
            $"{traffic.Seconds:f1} s; servers {string.Join(' ', servers.Select(server => server.Accepted))}; {proxy.Resident >> 20} MB");

        // of the routes that stay, in HAProxy's words
        async Task<long[]> Told(string column)
        {
            string[][] rows = [.. (await Tool.Proxy("--ctl", control, "show stat")).Good().Split('\n').Select(line => line.Split(','))];
            return [.. rows.Where(row => row[0] is "first" or "second" && row[1] == "FRONTEND").Select(
                row => long.Parse(row[Array.IndexOf(rows[0], column)], CultureInfo.InvariantCulture))];
        }

        // one listener stays as it is, one changes with its route, a third comes and goes
        string Text(int i) =>
            $"""
            control unix:{control}
            listen 127.0.0.1:0
            name first
            balance {(i % 2 == 0 ? "leastconn" : "roundrobin")}
            upstream {servers[i % 2].Address}
            upstream {servers[2].Address} weight={1 + (i % 3)}
            max-connections {1000 + i}
            queue {i % 4 * 100}
            max-connections-per-ip {(i % 5 == 0 ? 0 : 500)}
            listen 127.0.0.1:0
            name second
            upstream {servers[0].Address}
            {(i % 3 == 0 ? "#" : string.Empty)}listen 127.0.0.1:{(i == 0 ? 0 : extra[i - 1])}
            {(i % 3 == 0 ? "#" : string.Empty)}upstream echo

            """;
    }

    /// <summary>systemd-socket-activate holds nothing once it has started its command: so the command is a supervisor that has the
    /// socket and starts one proxy after the other on it, of two binaries in turn, now before the old one is told to end, now after.</summary>
    [Fact(Timeout = Slow)]
    public async Task With_the_sockets_of_systemd_a_new_binary_takes_over_and_no_client_notices()
    {
        const int Restarts = 20;
        string activate = Tool.Need("systemd-socket-activate", "systemd");
        Tool.Need("bash", "bash");
        File.Copy(ProxyProcess.Binary, Given.Path("binary0"));
        File.Copy(ProxyProcess.Binary, Given.Path("binary1"));
        foreach (string library in Tool.IsPortable ? Directory.GetFiles(Path.GetDirectoryName(ProxyProcess.Binary)!) : [])
        {
            File.Copy(library, Given.Path(Path.GetFileName(library)));
        }

        Upstream server = Given.Echo();
        int port = Given.FreePorts(1);
        string script = Given.Write("supervisor", $$"""
            cd {{Given.Folder}}
            start() {
                (LISTEN_PID=$BASHPID exec ./binary$(($1 % 2)) -l fd:web -u {{server.Address}} -u {{server.Address}} --drain-timeout 5m --port-file ports$1 2>log$1) &
                new=$!
            }
            await() { for n in $(seq 6000); do "$@" && return; sleep 0.01; done; kill $new; exit 1; }
            start 0
            await [ -e ports0 ]
            await [ -e begin ]
            for i in $(seq {{Restarts}}); do
                old=$new
                if [ $(($i % 2)) = 1 ]; then
                    start $i
                    await [ -e ports$i ]
                    kill $old
                else
                    kill $old
                    await grep -q event=draining log$(($i - 1))
                    start $i
                fi
                await grep -q event=connection log$i
                sleep 0.2
            done
            touch done
            await [ -e end ]
            kill $new
            for i in $(seq 0 {{Restarts}}); do wait -n || exit 1; done
            """);
        ProcessStartInfo start = new(activate, ["--fdname=web", "-l", $"127.0.0.1:{port}", Tool.Find("bash")!, script])
        {
            RedirectStandardError = true,
        };
        Process supervisor = Given.Owned(Process.Start(start)!);
        Given.AtEnd(async () =>
        {
            File.WriteAllText(Given.Path("begin"), string.Empty);
            File.WriteAllText(Given.Path("end"), string.Empty);
            await supervisor.WaitForExitAsync(); // in any case: it has its own patience
        });
        Task<string> chatter = supervisor.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        IPEndPoint target = new(IPAddress.Loopback, port);
        Peer? first = null;
        await Wait.Until(() => (first = TryConnect(target)) is not null, "systemd-socket-activate to listen");
        Peer stays = Given.Client(first!);
        await stays.Ask("hello");
        Traffic traffic = new(target);
        File.WriteAllText(Given.Path("begin"), string.Empty);
        await traffic.Run(int.MaxValue, 64, () => File.Exists(Given.Path("done")));
        await stays.Ask("still with the first one, which has been draining for long");
        stays.Finish();
        await stays.ExpectEnd();
        File.WriteAllText(Given.Path("end"), string.Empty);
        await supervisor.WaitForExitAsync(TestContext.Current.CancellationToken).Within($"the end of the supervisor");
        Assert.True(supervisor.ExitCode == 0, $"exit status {supervisor.ExitCode}: {await chatter}");
        traffic.Check();
        int[] served = [.. Enumerable.Range(0, Restarts + 1).Select(i => File.ReadLines(Given.Path($"log{i}")).Count(
            line => line.Contains("event=connection", StringComparison.Ordinal) && line.Contains("end=-- ", StringComparison.Ordinal)))];
        TestContext.Current.TestOutputHelper?.WriteLine($"{traffic.Done} connections in {traffic.Seconds:f1} s: {string.Join(' ', served)}");
        Assert.Equal(traffic.Done + 1, served.Sum());
        Assert.All(served, count => Assert.True(count > 0, "a proxy that served nobody"));

        static Peer? TryConnect(IPEndPoint target)
        {
            Socket socket = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
            try
            {
                socket.Connect(target);
                return new Peer(socket);
            }
            catch (SocketException)
            {
                socket.Dispose();
                return null;
            }
        }
    }
}

/// <summary>Clients that connect, say something, hear it again, and go; each must find all in order.</summary>
internal sealed class Traffic(params IPEndPoint[] targets)
{
    private long _started;
    private long _done;
    private long _failed;
    private string _firstFailure = string.Empty;

    public long Done => Volatile.Read(ref _done);

    public double Seconds { get; private set; }

    /// <summary>So many connections, so many of them at once; stops early when <paramref name="isOver"/>.</summary>
    public async Task Run(int count, int atOnce, Func<bool>? isOver = null)
    {
        long start = Environment.TickCount64;
        await Task.WhenAll(Enumerable.Range(0, atOnce).Select(_ => Task.Run(Worker)));
        Seconds = (Environment.TickCount64 - start) / 1000.0;

        async Task Worker()
        {
            byte[] buffer = new byte[64];
            for (long number; (number = Interlocked.Increment(ref _started)) <= count && isOver?.Invoke() != true;)
            {
                try
                {
                    await Converse(number, buffer).WaitAsync(TimeSpan.FromSeconds(30));
                    Interlocked.Increment(ref _done);
                }
                catch (Exception e) when (e is SocketException or TimeoutException or InvalidDataException)
                {
                    Interlocked.CompareExchange(ref _firstFailure, $"connection {number}: {e.Message}", string.Empty);
                    Interlocked.Increment(ref _failed);
                }
            }
        }
    }

    public void Check() => Assert.True(_failed == 0, $"{_failed} of {_failed + _done} connections failed; the first: {_firstFailure}");

    private async Task Converse(long number, byte[] buffer)
    {
        IPEndPoint target = targets[number % targets.Length];
        using Socket socket = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        socket.Bind(new IPEndPoint(new IPAddress([127, 1, (byte)(number % 8), (byte)(1 + (number % 200))]), 0)); // ports enough for all
        await socket.ConnectAsync(target);
        BitConverter.TryWriteBytes(buffer, number);
        await socket.SendAsync(buffer.AsMemory(0, 32));
        for (int length = 0, got; length < 32; length += got)
        {
            got = await socket.ReceiveAsync(buffer.AsMemory(32 + length, 32 - length));
            _ = got > 0 ? got : throw new InvalidDataException($"it ended after {length} of 32 bytes");
        }

        socket.Shutdown(SocketShutdown.Send);
        if (!buffer.AsSpan(0, 32).SequenceEqual(buffer.AsSpan(32)) || await socket.ReceiveAsync(buffer.AsMemory(0, 1)) != 0)
        {
            throw new InvalidDataException("other bytes came back");
        }
    }
}
