// The project's own benchmark: tcpproxy beside haproxy, nginx (stream), rinetd and socat, whichever are
// installed, on loopback. Started by ./build.sh bench.
//
// How it measures, and why:
// - The first figure is the proxy's CPU time for a unit of work, its whole process tree counted by the
//   kernel's nanosecond clock, read when nothing is in flight. Wall-clock figures move with the machine
//   and with the load generator; CPU for a counted amount of work moves little.
// - The programs take turns within a round, in a different order each round; a ratio is taken within a
//   round, and the median over the rounds is shown. What disturbs the machine for a while disturbs all.
// - The proxy has the last CPU for itself, load and backend have the others. On one CPU they share it,
//   and the report says so.
// - As root it runs in a network namespace of its own with TCP Reno: some systems pace loopback (BBR).
// - It ends by itself, and ends only what it started.

using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;

namespace TcpProxy.Bench;

internal enum Kind
{
    BulkUp,
    BulkDown,
    PingPong,
    ConnectRate,
    Mixed,
    Idle,
    Startup,
    Size,
}

/// <summary>One thing to measure. Names are what --workload matches by its beginning.</summary>
internal sealed record Case(string Name, string Title, Kind Kind, int Connections = 0, int Size = 1)
{
    internal bool UnderLoad => Kind < Kind.Idle;

    /// <summary>It lasts as long as the schedule says.</summary>
    internal bool HasWindow => Kind < Kind.Mixed;

    /// <summary>Divides units a second: bytes are shown as megabytes.</summary>
    internal double RateUnit => Kind is Kind.BulkUp or Kind.BulkDown or Kind.Mixed ? 1e6 : 1;

    /// <summary>Multiplies CPU seconds a unit: seconds a gigabyte, microseconds a request.</summary>
    internal double CpuUnit => Kind is Kind.BulkUp or Kind.BulkDown or Kind.Mixed ? 1e9 : 1e6;

    internal Service Service => Kind switch
    {
        Kind.BulkUp => Service.Sink,
        Kind.BulkDown or Kind.Mixed => Service.Source,
        Kind.ConnectRate => Service.Close,
        _ => Service.Reply,
    };

    internal static Case Up(int connections) =>
        new($"bulk/up/{connections}", $"bulk up, {Count(connections)}", Kind.BulkUp, connections);

    internal static Case Down(int connections) =>
        new($"bulk/down/{connections}", $"bulk down, {Count(connections)}", Kind.BulkDown, connections);

    internal static Case Ping(int size, int connections) => new(
        $"pingpong/{size}/{connections}",
        $"ping-pong {(size < 1024 ? $"{size} B" : $"{size / 1024} KB")}, {Count(connections)}",
        Kind.PingPong,
        connections,
        size);

    /// <summary>Fast readers beside slow ones.</summary>
    internal static Case Beside(int fast, int slow) => new(
        $"mixed/{fast}", $"{fast} fast readers beside {slow} slow ones", Kind.Mixed, fast + slow, fast);

    internal static Case Rate(int connections) =>
        new($"connrate/{connections}", $"connect, {connections} at once", Kind.ConnectRate, connections);

    internal static Case Quiet(int connections) => new(
        $"idle/{connections}",
        string.Create(CultureInfo.InvariantCulture, $"idle, {connections:N0} connections"),
        Kind.Idle,
        connections);

    private static string Count(int connections) =>
        connections == 1 ? "1 connection" : $"{connections} connections";
}

internal sealed class Options
{
    internal const string Help = """
        Usage: ./build.sh bench [OPTIONS]

        Measures tcpproxy beside whichever of haproxy, nginx (stream), rinetd and socat it finds installed,
        on loopback: bulk, ping-pong, connection rate, slow beside fast, idle memory, start, size. At most five minutes.

          --quick           a minute: fewer cases, one round
          --workload LIST   only cases that begin with one of these words, separated by commas: bulk,
                            bulk/up, bulk/down/16, pingpong, pingpong/64, pingpong/16384/512, connrate,
                            connrate/32, mixed, idle, idle/9000, startup, size
          --peers LIST      only these of haproxy,nginx,rinetd,socat
          --also NAME=CMD   a further build of tcpproxy, or the same with options ('copy=out/tcpproxy
                            --splice off'); may be repeated
          --rounds N        how often everything is measured (3, quick 1); more rounds are shorter ones
          --out FOLDER      where the results go (out/bench): NAME.md, NAME.json, NAME.svg
          --help            this text

        TCPPROXY_BIN names the binary (out/tcpproxy).
        """;

    internal bool Quick { get; private set; }
    internal int? Rounds { get; private set; }
    internal string Out { get; private set; } = Path.Combine(Root(), "out", "bench");
    internal string[]? Workload { get; private set; }
    internal string[]? OnlyPeers { get; private set; }
    internal List<(string Name, string Command)> Also { get; } = [];
    internal string CommandLine { get; private init; } = "";

    /// <summary>The project's folder, wherever it was called from.</summary>
    internal static string Root()
    {
        DirectoryInfo? folder = new(AppContext.BaseDirectory);
        while (folder is not null && !File.Exists(Path.Combine(folder.FullName, "TcpProxy.csproj")))
        {
            folder = folder.Parent;
        }
        return folder?.FullName ?? Environment.CurrentDirectory;
    }

    private static BenchException Wrong(string message) => new(message) { IsUsage = true };

    internal bool Wants(string peer) => OnlyPeers is null || OnlyPeers.Contains(peer);

    internal static Options Parse(string[] arguments)
    {
        Options options = new() { CommandLine = string.Join(' ', ["./build.sh bench", .. arguments]) };
        for (int i = 0; i < arguments.Length; i++)
        {
            string name = arguments[i];
            switch (name)
            {
                case "--quick":
                    options.Quick = true;
                    break;
                case "--workload":
                    options.Workload = Value().Split(',', StringSplitOptions.RemoveEmptyEntries);
                    break;
                case "--peers":
                    options.OnlyPeers = Value().Split(',', StringSplitOptions.RemoveEmptyEntries);
                    foreach (string peer in options.OnlyPeers.Except(Peers.Known))
                    {
                        throw Wrong($"--peers: unknown peer '{peer}'");
                    }
                    break;
                case "--rounds":
                    bool number = int.TryParse(Value(), CultureInfo.InvariantCulture, out int rounds);
                    options.Rounds = number && rounds is > 0 and < 100
                        ? rounds
                        : throw Wrong("--rounds: a number from 1 to 99");
                    break;
                case "--out":
                    options.Out = Value();
                    break;
                case "--also":
                    options.Also.Add(Build(Value()));
                    break;
                default:
                    throw Wrong($"{name}: unknown option; see --help");
            }

            string Value() =>
                ++i < arguments.Length ? arguments[i] : throw Wrong($"{name}: needs a value");
        }
        return options;
    }

    private static (string Name, string Command) Build(string text)
    {
        string[] pair = text.Split('=', 2);
        bool plain = pair[0].Length > 0 && pair[0].All(c => char.IsAsciiLetterOrDigit(c) || c is '-' or '.');
        if (pair.Length < 2 || !plain || pair[0] == "tcpproxy" || Peers.Known.Contains(pair[0]))
        {
            throw Wrong("--also: NAME=COMMAND, the name in plain letters and not taken");
        }
        string file = pair[1].Split(' ')[0];
        return File.Exists(file) ? (pair[0], pair[1]) : throw Wrong($"--also: no file '{file}'");
    }

    /// <summary>The cases to measure: a chosen few when quick, otherwise all, or those asked for.</summary>
    internal List<Case> Plan(int mostConnections)
    {
        int[] sizes = [64, 4096, 16384];
        Case[] quick =
        [
            Case.Up(1), Case.Up(16), Case.Down(16),
            Case.Ping(64, 1), Case.Ping(64, 64), Case.Ping(64, 512),
            Case.Ping(4096, 64), Case.Ping(16384, 64),
            Case.Rate(1), Case.Rate(32), Case.Quiet(Math.Min(1000, mostConnections)),
        ];
        Case[] all =
        [
            .. new[] { 1, 16, 128 }.Select(Case.Up),
            .. new[] { 1, 16, 128 }.Select(Case.Down),
            .. sizes.SelectMany(size => new[] { 1, 64, 512 }.Select(n => Case.Ping(size, n))),
            Case.Rate(1), Case.Rate(32), Case.Beside(16, 100),
            Case.Quiet(Math.Min(1000, mostConnections)), Case.Quiet(Math.Min(9000, mostConnections)),
        ];
        Case[] single = [new("startup", "start", Kind.Startup), new("size", "size", Kind.Size)];
        Case[] load = Quick && Workload is null ? quick : all;
        List<Case> plan = [.. load.Concat(single).DistinctBy(work => work.Name)];
        foreach (string word in Workload ?? [])
        {
            if (!plan.Any(work => Begins(work.Name, word)))
            {
                throw Wrong($"--workload: nothing begins with '{word}'; see --help");
            }
        }
        return [.. plan.Where(work => Workload is null || Workload.Any(word => Begins(work.Name, word)))];

        // Whole words: 'bulk/up/1' is not 'bulk/up/16'.
        static bool Begins(string name, string word) =>
            (name + "/").StartsWith(word.TrimEnd('/') + "/", StringComparison.Ordinal);
    }
}

internal static class Program
{
    internal const double WarmUpSeconds = 0.15;
    private static readonly Stopwatch Clock = Stopwatch.StartNew();
    private static int _port = 20_000;

    private static int Main(string[] arguments)
    {
        if (arguments.Contains("--help") || arguments.Contains("-h"))
        {
            Console.Out.WriteLine(Options.Help);
            return 0;
        }
        if (!OperatingSystem.IsLinux())
        {
            Console.Error.WriteLine("bench: Linux only: CPU and memory come from the kernel's counts");
            return 1;
        }
        string folder = Directory.CreateTempSubdirectory("tcpproxy-bench-").FullName;
        using PosixSignalRegistration interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Stop);
        using PosixSignalRegistration terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Stop);
        try
        {
            return Run(Options.Parse(arguments), folder);
        }
        catch (BenchException e)
        {
            Console.Error.WriteLine($"bench: {e.Message}");
            return e.IsUsage ? 2 : 1;
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }

        // The guard ends what is being measured and removes the folder.
        static void Stop(PosixSignalContext context) => Environment.Exit(130);
    }

    /// <summary>A line of progress; the table alone goes to standard output.</summary>
    internal static void Say(string text) => Console.Error.WriteLine(
        string.Create(CultureInfo.InvariantCulture, $"[{Clock.Elapsed:m\\:ss}] {text}"));

    /// <summary>The exit status: 1 when a build of tcpproxy failed at something.</summary>
    private static int Run(Options options, string folder)
    {
        int descriptors = Libc.RaiseDescriptorLimit();
        bool ownNetwork = EnterOwnNetwork();
        Cpus cpus = Cpus.Divide();
        Guard.Start(folder);
        List<Case> plan = options.Plan(Meter.MostConnections(descriptors));
        List<Peer> peers = Peers.Find(options, cpus, descriptors, folder);
        if (peers.Count == 0)
        {
            throw new BenchException("neither tcpproxy nor a peer was found");
        }
        Setting setting = Setting.Read(options, cpus, ownNetwork, peers);
        foreach (string line in setting.Lines)
        {
            Say(line);
        }
        Meter meter = new(cpus, new Backend(FreePort), folder, FreePort);
        List<Sample> samples = new Schedule(options, plan, peers, Clock).Measure(meter);
        Report report = new(setting, plan, peers, samples);
        Console.Out.Write(report.Markdown());
        foreach (string file in report.Save(options.Out))
        {
            Say($"written: {file}");
        }
        return samples.Any(s => s.Error is not null && peers.Any(p => p.Ours && p.Name == s.Peer)) ? 1 : 0;
    }

    private static bool EnterOwnNetwork()
    {
        if (!Libc.EnterOwnNetwork())
        {
            return false;
        }
        try
        {
            File.WriteAllText("/proc/sys/net/ipv4/tcp_congestion_control", "reno");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            Say($"congestion control stays as it is: {e.Message}");
        }
        return true;
    }

    /// <summary>Below the ports that the kernel hands to clients, so that none is taken in between.</summary>
    private static int FreePort()
    {
        while (true)
        {
            _port = _port < 32_000 ? _port + 1 : 20_001;
            int fd = Libc.Listen(_port);
            if (fd >= 0)
            {
                _ = Libc.close(fd);
                return _port;
            }
        }
    }
}

/// <summary>Who is measured when, and for how long, so that the whole ends in time.</summary>
internal sealed class Schedule(Options options, List<Case> plan, List<Peer> peers, Stopwatch clock)
{
    private readonly double _end = options.Quick ? 57 : 287;
    private readonly int _rounds = options.Rounds ?? (options.Quick ? 1 : 3);
    private readonly List<Sample> _samples = [];
    private double _overhead = 0.45; // seconds of a measurement that are not its window; learnt as it goes
    private double _spare = options.Quick ? 4 : 25; // for repeating what was disturbed
    private int _done;

    internal List<Sample> Measure(Meter meter)
    {
        int total = Enumerable.Range(1, _rounds).Sum(round => Turns(round).Count());
        for (int round = 1; round <= _rounds; round++)
        {
            Case? last = null;
            double window = 0;
            foreach ((Case work, Peer peer) in Turns(round))
            {
                window = work == last ? window : Window(round); // the same for all programs of a case
                last = work;
                if (clock.Elapsed.TotalSeconds + Expected(work, window) > _end + 2)
                {
                    Program.Say("the time is over: the rest is left out");
                    return _samples;
                }
                Sample sample = One(meter, round, work, peer, window);
                if (sample.Disturbed && _spare > 0)
                {
                    double start = clock.Elapsed.TotalSeconds;
                    Program.Say($"  {sample.Figures[Figure.Foreign]:P0} of a CPU went to others: once more");
                    Sample again = One(meter, round, work, peer, window);
                    bool better = again.Error is null
                        && again.Figures[Figure.Foreign] < sample.Figures[Figure.Foreign];
                    sample = better ? again : sample;
                    _spare -= clock.Elapsed.TotalSeconds - start;
                }
                _samples.Add(sample);
                _done++;
                string told = sample.Error is null ? Figure.Brief(work, sample) : $"failed: {sample.Error}";
                string done = $"{100 * _done / total,3} %  round {round}/{_rounds}";
                Program.Say($"{done}  {work.Name,-18} {peer.Name,-10} {told}");
            }
        }
        return _samples;
    }

    private Sample One(Meter meter, int round, Case work, Peer peer, double window)
    {
        Sample sample = new(round, work.Name, peer.Name);
        double start = clock.Elapsed.TotalSeconds;
        try
        {
            meter.Measure(work, peer, window, sample);
        }
        catch (Exception e) when (e is BenchException or IOException)
        {
            sample.Error = e.Message;
        }
        if (work.HasWindow && sample.Error is null)
        {
            double overhead = clock.Elapsed.TotalSeconds - start - window;
            _overhead = (_overhead * 0.9) + (overhead * 0.1);
        }
        return sample;
    }

    /// <summary>Case by case, and in a case program by program, the first one changing by round.</summary>
    private IEnumerable<(Case, Peer)> Turns(int round) =>
        from work in plan
        where round == 1 || work.UnderLoad || work.Kind == Kind.Startup
        from peer in peers.Skip((round - 1) % peers.Count).Concat(peers.Take((round - 1) % peers.Count))
        where work.Connections <= peer.MostConnections
        select (work, peer);

    /// <summary>What is left of the time, shared by the measurements under load that are left.</summary>
    private double Window(int round)
    {
        int before = Enumerable.Range(1, round - 1).Sum(earlier => Turns(earlier).Count());
        List<(Case Work, Peer)> left =
            [.. Enumerable.Range(round, _rounds - round + 1).SelectMany(Turns).Skip(_done - before)];
        double fixedTime = left.Where(turn => !turn.Work.HasWindow).Sum(turn => Expected(turn.Work, 0));
        int underLoad = left.Count(turn => turn.Work.HasWindow);
        if (underLoad == 0)
        {
            return 0;
        }
        double reserve = Math.Max(0, _spare) * underLoad / (underLoad + _done);
        double share = (_end - reserve - clock.Elapsed.TotalSeconds - fixedTime) / underLoad;
        return Math.Clamp(share - _overhead, 0.1, 1.5);
    }

    private double Expected(Case work, double window) => work.Kind switch
    {
        Kind.Mixed => 2.4,
        Kind.Idle => 2.7 + (work.Connections * 0.00035),
        Kind.Startup => 0.5,
        Kind.Size => 0.15,
        _ => window + _overhead,
    };
}

/// <summary>Where and with what the figures were taken; a figure without it means nothing.</summary>
internal sealed record Setting(DateTimeOffset Date, string Command, string[] Lines)
{
    internal static Setting Read(Options options, Cpus cpus, bool ownNetwork, List<Peer> peers)
    {
        string model = File.ReadLines("/proc/cpuinfo")
            .FirstOrDefault(line => line.StartsWith("model name", StringComparison.Ordinal))?
            .Split(':')[1].Trim() ?? RuntimeInformation.ProcessArchitecture.ToString();
        string control = File.ReadAllText("/proc/sys/net/ipv4/tcp_congestion_control").Trim();
        string kernel = File.ReadAllText("/proc/sys/kernel/osrelease").Trim();
        int all = Environment.ProcessorCount;
        string[] lines =
        [
            $"{model}, {RuntimeInformation.ProcessArchitecture}, CPUs: {all}, Linux {kernel}",
            cpus.Pinned
                ? $"pinned: the proxy has CPU {cpus.Proxy[0]} alone, load and backend have {Range(cpus.Load)}"
                : "one CPU: proxy, load and backend share it; throughput and latency are theirs together",
            $"loopback {(ownNetwork ? "in a network namespace" : "of the machine")}, TCP {control}",
            .. peers.Select(peer => $"{peer.Name}: {peer.Version}; {peer.How}"),
        ];
        return new Setting(DateTimeOffset.UtcNow, options.CommandLine, lines);
    }

    private static string Range(int[] cpus) =>
        cpus.Length == 1 ? $"CPU {cpus[0]}" : $"CPUs {cpus[0]}-{cpus[^1]}";
}
