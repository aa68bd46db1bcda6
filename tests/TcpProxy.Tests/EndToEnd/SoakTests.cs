using System;
using System.Collections.Generic;
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

/// <summary>
/// Two minutes of all that happens in years (TCPPROXY_SOAK_SECONDS=3600 for an hour of it): messages and streams, slow
/// and rude clients, full tables, servers that fail, a configuration that changes under way. What was taken is given
/// back, and every byte is accounted for: what clients counted, what the log says and what the counters say is the same.
/// </summary>
[Collection("heavy")]
public sealed class SoakTests : EndToEndTest
{
    private const int Workers = 32;
    private const int Pause = 80; // ms at most between two conversations of a worker: an hour's log has its bounds
    private const long Slack = 8 << 20; // bytes: buffers that the pool keeps, and the garbage of a moment

    private static readonly double Seconds = double.Parse(
        Environment.GetEnvironmentVariable("TCPPROXY_SOAK_SECONDS") ?? "120", CultureInfo.InvariantCulture);

    private readonly Stopwatch _clock = new();
    private readonly Upstream[] _servers = new Upstream[3];
    private readonly Tally _clean = new();
    private Upstream? _moody;
    private int _port;
    private int _cut; // clean conversations that a failing server has cut
    private int _rude;
    private int _crowding;
    private int _served; // of those

    private volatile bool _isBroken;

    private bool IsOver => _isBroken || _clock.Elapsed.TotalSeconds >= Seconds;

    [Fact(Timeout = 3_900_000)]
    public async Task What_was_taken_is_given_back_and_every_byte_is_accounted_for()
    {
        _port = Given.FreePorts(5);
        for (int i = 0; i < _servers.Length; i++)
        {
            // an address each, so that a port that is given up is not taken by a client meanwhile
            _servers[i] = Given.Echo(new IPEndPoint(IPAddress.Parse($"127.0.0.{i + 2}"), 0));
        }

        int moods = 0;
        _moody = Given.Server(peer => BeMoody(peer, new Random(Interlocked.Increment(ref moods))));
        ProxyProcess proxy = await Given.Proxy("-c", Write(0));
        int descriptors = proxy.Descriptors;
        _clock.Start();

        List<(double Time, long Bytes)> resident = [];
        Task[] beside = [Wait.Apart(() => Reload(proxy)), Wait.Apart(FailServers), Wait.Apart(() => Watch(proxy, resident))];
        await Wait.Many(Workers, Workers, Work);
        await Task.WhenAll(beside);

        Dictionary<string, long> counted = await Counters();
        for (long start = Environment.TickCount64; counted["scur"] > 0; counted = await Counters())
        {
            Assert.True(Environment.TickCount64 - start < 20_000, $"{counted["scur"]} bridges do not end");
            await Wait.Pause(100);
        }

        counted = await Counters(); // scur is newer than the sums beside it: who ended between them is in these

        // each thread of the proxy may keep one pipe
        await Wait.Until(
            () => proxy.Descriptors <= descriptors + (2 * proxy.Threads), "descriptors to be given back");
        Assert.Equal(0, await proxy.Stop());
        CheckAccounts(counted);
        CheckMemory(resident);
    }

    // ---- what happens

    private string Write(int version) => Given.Write("soak.conf", $"""
        log-file {Given.Path("log")}
        control unix:{Given.Path("control")}
        fin-timeout 5s

        listen 127.0.0.1:{_port}
          name web
          balance {(version % 4 < 2 ? "roundrobin" : "leastconn")}
          max-fails 1
          fail-timeout 500ms
          check 300ms
          upstream {_servers[0].Address} weight={1 + (version % 3)}
          upstream {_servers[1].Address}
          upstream {_servers[2].Address}

        listen 127.0.0.1:{_port + 1}
          name tight
          max-connections {8 + (version % 2)}
          max-connections-per-ip 3
          queue 4
          queue-timeout 200ms
          upstream echo

        listen 127.0.0.1:{_port + 2}
          name rude
          idle-timeout 1s
          fin-timeout 1s
          max-lifetime 3s 2s
          rate-up 20m/s
          upstream {_moody!.Address}

        listen 127.0.0.1:{_port + 3}
          name changed
          replace-up hello=>HELLO
          upstream {_servers[0].Address}
          upstream {_servers[1].Address}
          max-fails 1
        {(version % 2 == 0 ? "" : $"listen 127.0.0.1:{_port + 4}\n  name passing\n  upstream echo")}
        {(version % 5 == 4 ? "balance lestconn" : "")}
        """);

    /// <summary>Every fifth file is a bad one.</summary>
    private async Task Reload(ProxyProcess proxy)
    {
        for (int version = 1; !IsOver; version++)
        {
            await Wait.Pause(1500);
            Write(version);
            proxy.Signal(ProxyProcess.SigHup);
        }
    }

    private async Task FailServers()
    {
        for (int i = 0; !IsOver; i = (i + 1) % _servers.Length)
        {
            await Wait.Pause(1000);
            _servers[i].Refuse();
            await Wait.Pause(1000);
            _servers[i] = Given.Echo(_servers[i].Endpoint);
            await Wait.Pause(1000); // for the check to see it: one server at a time is down
        }
    }

    private async Task Watch(ProxyProcess proxy, List<(double Time, long Bytes)> resident)
    {
        while (!IsOver)
        {
            await Wait.Pause((int)(Seconds * 1000 / 60));
            resident.Add((_clock.Elapsed.TotalSeconds, proxy.Resident));
        }
    }

    private async Task Work(int worker)
    {
        Random random = new(worker);
        while (!IsOver)
        {
            await (random.Next(10) switch
            {
                < 6 => TalkCleanly(worker, random),
                < 8 => BeRude(worker, random),
                _ => Crowd(random),
            });
            await Wait.Pause(random.Next(Pause));
        }
    }

    /// <summary>What is sent comes back, all of it, and both sides finish.</summary>
    private async Task TalkCleanly(int worker, Random random)
    {
        bool isChanged = random.Next(4) == 0;
        using Peer client = await Connect(isChanged ? 3 : 0, $"127.8.0.{worker + 1}");
        try
        {
            long length = await (random.Next(6) switch
            {
                0 when !isChanged => Stream(client, new Pattern(random.Next()), random.Next(1, 8 << 20)),
                1 when !isChanged => ReadSlowly(client, new Pattern(random.Next())),
                2 => Task.FromResult(0L), // one who only looks
                _ => Talk(client, random.Next(1, 10), isChanged ? "HELLO, once more" : "hello, once more"),
            });
            client.Finish();
            (byte[] rest, SocketError error) = await client.Drain();
            Assert.Empty(rest);
            if (error != SocketError.Success)
            {
                throw new SocketException((int)error);
            }

            _clean.Add(length, length);
        }
        catch (SocketException)
        {
            Interlocked.Increment(ref _cut); // the kernel had taken it for a server that closed its listener just then
        }
        catch (Exception e)
        {
            _isBroken = true;
            await Wait.Pause(1000);
            IEnumerable<string> lines = File.ReadLines(Given.Path("log")).Where(line => line.Contains(client.Local, StringComparison.Ordinal));
            throw new InvalidOperationException($"{client.Local}: {e.Message}\n{string.Join('\n', lines)}", e);
        }
    }

    /// <summary>Long enough to be spliced, both ways at once.</summary>
    private static async Task<long> Stream(Peer client, Pattern pattern, long length)
    {
        await Task.WhenAll(client.Send(pattern, length), client.Receive(pattern, length));
        return length;
    }

    /// <summary>The kernel tells of a reset once: where the sender hears of it, the reader finds an end.</summary>
    private static async Task<long> ReadSlowly(Peer client, Pattern pattern)
    {
        const int Step = 60_000;
        const long Length = 10 * Step;
        await Task.WhenAll(client.Send(pattern, Length), Read());
        return Length;

        async Task Read()
        {
            for (long at = 0; at < Length; at += Step)
            {
                await Wait.Pause(50);
                await client.Receive(pattern, Step, at);
            }
        }
    }

    private static async Task<long> Talk(Peer client, int count, string answer)
    {
        for (int i = 0; i < count; i++)
        {
            await client.Send("hello, once more");
            await client.ReceiveText(answer);
        }

        return count * answer.Length;
    }

    /// <summary>Breaks off, halts, says nothing or too much.</summary>
    private async Task BeRude(int worker, Random random)
    {
        using Peer client = await Connect(random.Next(2) == 0 ? 2 : 0, $"127.9.0.{worker + 1}");
        Interlocked.Increment(ref _rude);
        try
        {
            switch (random.Next(5))
            {
                case 0:
                    break; // resets at once
                case 1:
                    await client.SendSome(new byte[1 << 20]);
                    break;
                case 2: // sends, never reads, stays
                    await Task.WhenAny(client.Send(new Pattern(1), 4 << 20), Wait.Pause(1500));
                    break;
                case 3:
                    await client.Send("good bye");
                    client.Finish();
                    await Wait.Pause(random.Next(1500));
                    break;
                default:
                    await client.Send("?");
                    await Task.WhenAny(client.Drain(), Wait.Pause(1200));
                    break;
            }
        }
        catch (SocketException)
        {
            // the server, or a time limit, was first
        }

        client.Reset();
    }

    /// <summary>More than there is room for: served in turn or sent away, but not left alone.</summary>
    private Task Crowd(Random random) => Task.WhenAll(Enumerable.Range(0, 4).Select(_ => random.Next()).Select(async seed =>
    {
        using Peer client = await Connect(1, $"127.7.{seed % 4}.{1 + (seed / 4 % 250)}");
        Interlocked.Increment(ref _crowding);
        try
        {
            await client.Send("hello");
            await Wait.Pause(100);
            client.Finish();
            (byte[] answer, SocketError error) = await client.Drain();
            Assert.True(answer.Length is 0 or 5, $"{answer.Length} bytes of 5");
            if (error == SocketError.Success && answer.Length == 5)
            {
                Interlocked.Increment(ref _served);
            }
        }
        catch (SocketException)
        {
            // sent away
        }
    }));

    private static async Task BeMoody(Peer peer, Random random)
    {
        byte[] block = new byte[100_000];
        switch (random.Next(4))
        {
            case 0:
                peer.Reset();
                return;
            case 1:
                await peer.ReceiveSome(block);
                await peer.SendSome(block);
                peer.Reset();
                return;
            case 2:
                await Task.Delay(2000); // keeps silent
                peer.Dispose();
                return;
            default:
                await Upstream.EchoAsync(peer);
                return;
        }
    }

    private Task<Peer> Connect(int listen, string from) => Peer.Connect(
        new IPEndPoint(IPAddress.Loopback, _port + listen), new IPEndPoint(IPAddress.Parse(from), 0));

    // ---- what must hold

    /// <summary>Sums over the routes, by the column names of HAProxy's statistics.</summary>
    private async Task<Dictionary<string, long>> Counters()
    {
        string answer = (await Tool.Run(ProxyProcess.Binary, "--ctl", Given.Path("control"), "show stat")).Good();
        string[][] rows = [.. answer.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(line => line.Split(','))];
        string[][] routes = [.. rows.Where(row => row[1] == "FRONTEND")];
        Assert.Contains(routes, row => row[0] == "web");
        return new[] { "scur", "conn_tot", "bin", "bout" }.ToDictionary(
            name => name,
            name => routes.Sum(row => long.Parse(row[Array.IndexOf(rows[0], name)], CultureInfo.InvariantCulture)));
    }

    private void CheckAccounts(Dictionary<string, long> counted)
    {
        Dictionary<string, Tally> said = new() { ["127.7"] = new(), ["127.8"] = new(), ["127.9"] = new() };
        Tally all = new();
        int broken = 0;
        int leftOut = 0;
        HashSet<string> events = [];
        foreach (LogLine line in File.ReadLines(Given.Path("log")).Select(LogLine.Parse))
        {
            events.Add(line.Event);
            if (line.Event == "refused")
            {
                leftOut += int.Parse(line["message"].Split(' ')[0], CultureInfo.InvariantCulture);
            }
            else if (line.Event == "connection")
            {
                string who = line["client"][..5];
                all.Add(line.BytesUp, line.BytesDown);
                if (who == "127.8" && line.End != "--")
                {
                    broken++;
                }
                else
                {
                    said[who].Add(line.BytesUp, line.BytesDown);
                }
            }
        }

        TestContext.Current.TestOutputHelper?.WriteLine(
            $"clean {_clean}, {_cut} cut; rude {_rude}; crowding {_crowding}, {_served} served, {leftOut} left out of the log\n"
            + $"log {all}; counters {counted["conn_tot"]} connections, {counted["bin"]} up, {counted["bout"]} down\n"
            + $"events {string.Join(' ', events.Order())}");
        Assert.DoesNotContain("internal-error", events);
        Assert.Superset(new HashSet<string> { "reload", "server", "draining", "stopped" }, events);
        Assert.Equal(_clean.ToString(), said["127.8"].ToString());
        Assert.Equal(_cut, broken);
        Assert.True(_cut * 50 <= _clean.Connections, $"{_cut} of {_clean.Connections} clean conversations were cut");
        Assert.Equal(_rude, said["127.9"].Connections);
        Assert.Equal(_crowding, said["127.7"].Connections + leftOut);
        Assert.InRange(_served, 1, _crowding - 1);
        Assert.Equal((all.Connections + leftOut, all.Up, all.Down), (counted["conn_tot"], counted["bin"], counted["bout"]));
    }

    /// <summary>The least-squares line through what was resident, once the start is over.</summary>
    private static void CheckMemory(List<(double Time, long Bytes)> resident)
    {
        (double Time, long Bytes)[] late = [.. resident.Skip(resident.Count / 4)];
        double time = late.Average(sample => sample.Time);
        double bytes = late.Average(sample => sample.Bytes);
        double slope = late.Sum(s => (s.Time - time) * (s.Bytes - bytes)) / late.Sum(s => (s.Time - time) * (s.Time - time));
        double span = late[^1].Time - late[0].Time;
        string words = $"resident {bytes / 1024:0} KB on average, {late.Max(s => s.Bytes) / 1024} at most; "
            + $"slope {slope * 60 / 1024:0.0} KB a minute over {span:0} s";
        TestContext.Current.TestOutputHelper?.WriteLine(
            $"{words}; over time: {string.Join(' ', resident.Select(s => s.Bytes / 1024))}");
        Assert.True(slope * span < Slack, words);
    }

    private sealed class Tally
    {
        private long _connections;
        private long _up;
        private long _down;

        public long Connections => _connections;

        public long Up => _up;

        public long Down => _down;

        public void Add(long up, long down)
        {
            Interlocked.Increment(ref _connections);
            Interlocked.Add(ref _up, up);
            Interlocked.Add(ref _down, down);
        }

        public override string ToString() => $"{_connections} connections, {_up} bytes up, {_down} down";
    }
}
