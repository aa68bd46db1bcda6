using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Text;
using System.Threading;

namespace TcpProxy.Bench;

internal sealed class BenchException(string message) : Exception(message)
{
    internal bool IsUsage { get; init; }
}

/// <summary>The figures of one measurement of one program, by key; or why there are none.</summary>
internal sealed class Sample(int round, string @case, string peer)
{
    internal int Round { get; } = round;
    internal string Case { get; } = @case;
    internal string Peer { get; } = peer;
    internal string? Error { get; set; }
    internal bool Disturbed { get; set; }
    internal Dictionary<string, double> Figures { get; } = [];
}

/// <summary>A program that the bench has started. It leads a session: so its children are found.</summary>
internal sealed class Child : IDisposable
{
    private const double TicksPerSecond = 100;
    private bool _reaped;

    private Child(int id) => Id = id;

    internal int Id { get; }

    internal bool Ended => _reaped || (_reaped = Libc.Reap(Id, wait: false));

    /// <summary>Starts a program on the given CPUs.</summary>
    internal static Child Start(string[] arguments, string log, Cpus cpus)
    {
        // A child inherits the CPUs of the thread that starts it; no helper program delays its start.
        Libc.SetAffinity(0, cpus.Proxy);
        try
        {
            Child child = new(Libc.Spawn(arguments, log));
            Guard.Watch(child.Id);
            return child;
        }
        finally
        {
            Libc.SetAffinity(0, cpus.Load);
        }
    }

    /// <summary>Asks the session to end, and after a second ends it.</summary>
    public void Dispose()
    {
        _ = Libc.kill(-Id, Libc.SigTerm);
        long limit = Stopwatch.GetTimestamp() + Stopwatch.Frequency;
        while (!Ended || Session(living: true).Count > 0)
        {
            if (Stopwatch.GetTimestamp() > limit)
            {
                Kill();
                break;
            }
            _ = Libc.usleep(2000);
        }
        Guard.Watch(0);
    }

    private void Kill()
    {
        _ = Libc.kill(-Id, Libc.SigKill);
        if (!_reaped)
        {
            _reaped = Libc.Reap(Id, wait: true);
        }
    }

    /// <summary>CPU seconds used so far by the process, its descendants and those that ended.</summary>
    internal double CpuSeconds()
    {
        double total = 0;
        foreach ((int id, string[] stat) in Session(living: false))
        {
            long own = Libc.CpuNanoseconds(id);
            total += own >= 0 ? own / 1e9 : (Ticks(stat[11]) + Ticks(stat[12])) / TicksPerSecond;
            total += (Ticks(stat[13]) + Ticks(stat[14])) / TicksPerSecond;
        }
        return total;
    }

    /// <summary>Kilobytes of memory, shared pages divided among their users; and the processes.</summary>
    internal (double PssKilobytes, int Processes) Memory()
    {
        double total = 0;
        List<(int Id, string[] Stat)> session = Session(living: true);
        foreach ((int id, _) in session)
        {
            total += Field($"/proc/{id}/smaps_rollup", "Pss:");
        }
        return (total, session.Count);
    }

    /// <summary>The most that was ever resident at once, summed over the processes.</summary>
    internal double PeakKilobytes() =>
        Session(living: true).Sum(process => Field($"/proc/{process.Id}/status", "VmHWM:"));

    /// <summary>The shared libraries in use other than the C library's own.</summary>
    internal string[] Libraries()
    {
        const StringComparison Ordinal = StringComparison.Ordinal;
        string[] own = ["libc.so", "ld-linux", "ld-musl", "libm.so", "libpthread", "libdl", "librt"];
        return [.. File.ReadLines($"/proc/{Id}/maps")
            .Select(line => line[(line.LastIndexOf(' ') + 1)..])
            .Where(path => path.StartsWith('/') && path.Contains(".so", StringComparison.Ordinal))
            .Distinct()
            .Where(path => !Array.Exists(own, name => Path.GetFileName(path).StartsWith(name, Ordinal)))];
    }

    private List<(int Id, string[] Stat)> Session(bool living)
    {
        List<(int, string[])> found = [];
        string session = Id.ToString(CultureInfo.InvariantCulture);
        foreach (string folder in Directory.EnumerateDirectories("/proc"))
        {
            if (!int.TryParse(Path.GetFileName(folder), CultureInfo.InvariantCulture, out int id))
            {
                continue;
            }
            try
            {
                string stat = File.ReadAllText(folder + "/stat");
                string[] fields = stat[(stat.LastIndexOf(')') + 2)..].Split(' ');
                if (fields[3] == session && !(living && fields[0] == "Z"))
                {
                    found.Add((id, fields));
                }
            }
            catch (IOException)
            {
                // It ended between the listing and the reading.
            }
        }
        return found;
    }

    private static double Field(string file, string name)
    {
        try
        {
            foreach (string line in File.ReadLines(file))
            {
                if (line.StartsWith(name, StringComparison.Ordinal))
                {
                    return Ticks(line[name.Length..].Trim().Split(' ')[0]);
                }
            }
        }
        catch (IOException)
        {
            // It ended between the listing and the reading.
        }
        return 0;
    }

    private static double Ticks(string text) => double.Parse(text, CultureInfo.InvariantCulture);
}

/// <summary>
/// A shell that waits for the bench to end, however it ends, and then ends the program that was being
/// measured and removes the scratch folder: a bench that is killed leaves nothing behind.
/// </summary>
internal static unsafe class Guard
{
    private const string Script = """
        while read -r id; do last=$id; done
        [ "${last:-0}" -eq 0 ] || kill -s KILL -- "-$last"
        rm -rf -- "$1"
        """;

    private static int _pipe = -1;

    internal static void Start(string folder)
    {
        int* ends = stackalloc int[2];
        Libc.Check(Libc.pipe2(ends, 0x80000), "pipe2");
        _ = Libc.Spawn(["/bin/sh", "-c", Script, "sh", folder], "/dev/null", ends[0]);
        _ = Libc.close(ends[0]);
        _pipe = ends[1];
    }

    internal static void Watch(int processId)
    {
        byte[] line = [.. Encoding.ASCII.GetBytes($"{processId}\n")];
        fixed (byte* data = line)
        {
            _ = Libc.write(_pipe, data, line.Length);
        }
    }
}

/// <summary>
/// Who runs where: the proxy alone on the last CPU; load and backend on the first ones, of which they can
/// use few. The first and the last are seldom two threads of one core.
/// </summary>
internal sealed record Cpus(int[] Proxy, int[] Load, bool Pinned)
{
    internal static Cpus Divide()
    {
        int[] all = Libc.AllowedCpus();
        Cpus cpus = all.Length > 1
            ? new([all[^1]], all[..Math.Min(4, all.Length - 1)], true)
            : new(all, all, false);
        foreach (string thread in Directory.EnumerateDirectories("/proc/self/task"))
        {
            Libc.SetAffinity(int.Parse(Path.GetFileName(thread), CultureInfo.InvariantCulture), cpus.Load);
        }
        return cpus;
    }
}

/// <summary>The measurements themselves. Each has a fresh proxy and ends with it stopped.</summary>
internal sealed unsafe class Meter(Cpus cpus, Backend backend, string folder, Func<int> freePort)
{
    private const double QuietSeconds = 2;
    private const double OpenSeconds = 8;
    private const double ForeignLimit = 0.25;

    /// <summary>Half of this process's descriptors are the clients', half the backend's.</summary>
    internal static int MostConnections(int descriptors) => (descriptors - 400) / 2;

    internal void Measure(Case work, Peer peer, double seconds, Sample into)
    {
        switch (work.Kind)
        {
            case Kind.Idle:
                Idle(work, peer, into);
                break;
            case Kind.Startup:
                Startup(peer, into);
                break;
            case Kind.Size:
                Size(peer, into);
                break;
            default:
                UnderLoad(work, peer, seconds, into);
                break;
        }
    }

    /// <summary>CPU is read when nothing is in flight: it belongs to exactly the work counted.</summary>
    private void UnderLoad(Case work, Peer peer, double seconds, Sample into)
    {
        Counters counters = backend.Begin(work.Size);
        int port = freePort();
        using Child proxy = StartProxy(peer, port, work.Service);
        using Load load = work.Kind switch
        {
            Kind.BulkUp => new BulkUp(port, work.Connections, counters),
            Kind.BulkDown => new BulkDown(port, work.Connections, counters),
            Kind.Mixed => new Mixed(port, work.Size, work.Connections - work.Size, counters),
            Kind.PingPong => new PingPong(port, work.Connections, counters),
            _ => new ConnectRate(port, work.Connections, counters),
        };
        load.Open();
        _ = load.Run(Program.WarmUpSeconds);
        _ = Libc.usleep(20_000);

        int errors = load.Errors;
        double busyBefore = BusySeconds();
        double ownBefore = Libc.CpuNanoseconds(0) / 1e9;
        double cpuBefore = proxy.CpuSeconds();
        long start = Stopwatch.GetTimestamp();
        Work done = load.Run(seconds);
        double elapsed = Stopwatch.GetElapsedTime(start).TotalSeconds;
        double cpu = proxy.CpuSeconds() - cpuBefore;
        double own = (Libc.CpuNanoseconds(0) / 1e9) - ownBefore;
        double foreign = (BusySeconds() - busyBefore - own - cpu) / elapsed;

        if (load.Errors > errors || done.Units == 0)
        {
            throw new BenchException($"{load.Errors - errors} of its connections failed");
        }
        into.Disturbed = foreign > ForeignLimit;
        into.Figures[Figure.Rate] = done.Units / done.Seconds / work.RateUnit;
        into.Figures[Figure.Cpu] = cpu / done.Units * work.CpuUnit;
        into.Figures[Figure.Busy] = cpu / done.Seconds;
        into.Figures[Figure.Foreign] = Math.Max(0, foreign);
        into.Figures[Figure.Peak] = proxy.PeakKilobytes();
        if (load is Mixed mixed)
        {
            into.Figures[Figure.Kept] = mixed.Kept;
        }
        if (work.Kind is Kind.PingPong or Kind.ConnectRate)
        {
            into.Figures[Figure.P50] = load.Latency.Microseconds(50);
            into.Figures[Figure.P99] = load.Latency.Microseconds(99);
        }
    }

    /// <summary>Memory of connections that have carried a byte each way and have been quiet since.</summary>
    private void Idle(Case work, Peer peer, Sample into)
    {
        _ = backend.Begin(messageSize: 1);
        int port = freePort();
        using Child proxy = StartProxy(peer, port, Service.Reply);
        _ = Libc.usleep(200_000);
        double before = proxy.Memory().PssKilobytes;
        List<int> open = new(work.Connections);
        try
        {
            long opening = Stopwatch.GetTimestamp();
            while (open.Count < work.Connections)
            {
                int fd = Exchange(port, timeoutSeconds: 3);
                open.Add(fd >= 0 ? fd : throw new BenchException($"connection {open.Count + 1} failed"));
                if (Stopwatch.GetElapsedTime(opening).TotalSeconds > OpenSeconds)
                {
                    throw new BenchException($"only {open.Count} connections in {OpenSeconds} s");
                }
            }
            Thread.Sleep(TimeSpan.FromSeconds(QuietSeconds / 2));
            double cpu = proxy.CpuSeconds();
            long start = Stopwatch.GetTimestamp();
            Thread.Sleep(TimeSpan.FromSeconds(QuietSeconds / 2));
            cpu = (proxy.CpuSeconds() - cpu) / Stopwatch.GetElapsedTime(start).TotalSeconds;
            (double pss, int processes) = proxy.Memory();
            into.Figures[Figure.PerConnection] = (pss - before) / work.Connections;
            into.Figures[Figure.IdleCpu] = cpu * 1000;
            into.Figures[Figure.Pss] = pss;
            into.Figures[Figure.Processes] = processes;
        }
        finally
        {
            open.ForEach(fd => Libc.close(fd));
        }
    }

    /// <summary>From the program's start to the first byte back through it; the median of three.</summary>
    private void Startup(Peer peer, Sample into)
    {
        _ = backend.Begin(messageSize: 1);
        List<double> times = [];
        List<double> memory = [];
        for (int i = 0; i < 3; i++)
        {
            int port = freePort();
            string[] arguments = peer.Prepare(port, backend.Port(Service.Reply), folder);
            long start = Stopwatch.GetTimestamp();
            using Child proxy = Child.Start(arguments, LogOf(peer), cpus);
            int fd;
            while ((fd = Exchange(port, timeoutSeconds: 2)) < 0)
            {
                if (proxy.Ended || Stopwatch.GetElapsedTime(start).TotalSeconds > 10)
                {
                    throw new BenchException($"did not relay; {LastLine(peer)}");
                }
                _ = Libc.usleep(200);
            }
            times.Add(Stopwatch.GetElapsedTime(start).TotalMilliseconds);
            memory.Add(proxy.Memory().PssKilobytes);
            _ = Libc.close(fd);
        }
        into.Figures[Figure.Start] = Report.Median(times);
        into.Figures[Figure.Pss] = Report.Median(memory);
    }

    private void Size(Peer peer, Sample into)
    {
        using Child proxy = StartProxy(peer, freePort(), Service.Reply);
        double own = peer.Files.Sum(Kilobytes);
        into.Figures[Figure.Binary] = own;
        into.Figures[Figure.WithLibraries] = own + proxy.Libraries().Except(peer.Files).Sum(Kilobytes);
    }

    private static double Kilobytes(string file)
    {
        FileInfo info = new(file);
        return ((info.ResolveLinkTarget(returnFinalTarget: true) as FileInfo) ?? info).Length / 1024.0;
    }

    /// <summary>Opens a connection, sends a byte, gets it back. The descriptor, or -1.</summary>
    private static int Exchange(int port, int timeoutSeconds)
    {
        int fd = Libc.Connect(port, timeoutSeconds);
        if (fd < 0)
        {
            return -1;
        }
        byte one = 1;
        if (Libc.send(fd, &one, 1, Libc.NoSignal) == 1 && Libc.recv(fd, &one, 1, 0) == 1)
        {
            return fd;
        }
        _ = Libc.close(fd);
        return -1;
    }

    private Child StartProxy(Peer peer, int port, Service service)
    {
        Child proxy = Child.Start(peer.Prepare(port, backend.Port(service), folder), LogOf(peer), cpus);
        long start = Stopwatch.GetTimestamp();
        while (!Listening(port))
        {
            if (proxy.Ended || Stopwatch.GetElapsedTime(start).TotalSeconds > 10)
            {
                proxy.Dispose();
                throw new BenchException($"did not start; {LastLine(peer)}");
            }
            _ = Libc.usleep(1000);
        }
        _ = Libc.usleep(20_000);
        return proxy;
    }

    /// <summary>Seen in the kernel's table, so that the first connection is the load's.</summary>
    private static bool Listening(int port)
    {
        // The thread's own network: /proc/self/net would be that of the process's first thread.
        string wanted = $":{port:X4} 00000000:0000 0A";
        return File.ReadLines("/proc/thread-self/net/tcp")
            .Skip(1)
            .TakeWhile(line => line.Contains(" 0A ", StringComparison.Ordinal)) // listeners stand first
            .Any(line => line.Contains(wanted, StringComparison.Ordinal));
    }

    private string LogOf(Peer peer) => Path.Combine(folder, peer.Name + ".log");

    private string LastLine(Peer peer) => File.ReadLines(LogOf(peer)).LastOrDefault() ?? "it said nothing";

    /// <summary>Seconds for which the CPUs of the bench were busy or taken away, by whomever.</summary>
    private double BusySeconds()
    {
        string[] names = [.. cpus.Proxy.Union(cpus.Load).Select(cpu => $"cpu{cpu}")];
        int[] busy = [1, 2, 3, 6, 7, 8]; // user, nice, system, irq, softirq, steal; not idle, not iowait
        return File.ReadLines("/proc/stat")
            .Select(line => line.Split(' '))
            .Where(fields => names.Contains(fields[0]))
            .Sum(fields => busy.Sum(i => double.Parse(fields[i], CultureInfo.InvariantCulture))) / 100;
    }
}
