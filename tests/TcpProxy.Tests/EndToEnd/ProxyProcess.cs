using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>How a proxy is started where the plain way will not do.</summary>
internal sealed record Launch
{
    /// <summary>
    /// Words in front of the binary: a launcher that ends in exec, so that the process id stays the same.
    /// </summary>
    public IReadOnlyList<string> Before { get; init; } = [];

    /// <summary>The binary as the launcher sees it, where that differs (a chroot).</summary>
    public string? Binary { get; init; }

    /// <summary>The port file as the launcher sees it; the test reads it under <see cref="Root"/>.</summary>
    public string? PortFile { get; init; }

    /// <summary>The root directory of the launched process.</summary>
    public string Root { get; init; } = string.Empty;

    public bool AwaitReady { get; init; } = true;

    /// <summary>Whether anybody reads the log from the start.</summary>
    public bool ReadLog { get; init; } = true;

    /// <summary>How the launcher's own lines begin, which are none of the proxy's.</summary>
    public IReadOnlyList<string> Chatter { get; init; } = [];

    /// <summary>
    /// Whether the last line of the log may be incomplete: nobody read the log until the process had ended.
    /// </summary>
    public bool MayBreakOff { get; init; }

    /// <summary>The exit status at the end of the test.</summary>
    public int ExpectedExit { get; init; }

    public Dictionary<string, string> Environment { get; init; } = [];

    /// <summary>Runs under a soft and hard limit of open descriptors.</summary>
    public static Launch WithDescriptors(int count) => FromShell($"ulimit -n {count}");

    /// <summary>Runs from a shell that does something first, or has redirected its streams.</summary>
    public static Launch FromShell(string first = ":", string streams = "") =>
        new() { Before = ["sh", "-c", $"{first}; exec \"$0\" \"$@\" {streams}"] };
}

/// <summary>A running proxy: its addresses, its log, its resources and its end.</summary>
internal sealed class ProxyProcess
{
    public const int SigHup = 1;
    public const int SigInt = 2;
    public const int SigKill = 9;
    public const int SigUsr1 = 10;
    public const int SigUsr2 = 12;
    public const int SigTerm = 15;
    public const int SigCont = 18;
    public const int SigStop = 19;

    private readonly Process _process;
    private readonly Launch _launch;
    private readonly string _command;
    private readonly string _portFile;
    private readonly List<string> _raw = [];
    private readonly List<LogLine> _lines = [];
    private readonly List<string> _faults = [];
    private readonly HashSet<string> _tolerated = [];
    private readonly StringBuilder _stdout = new();
    private TaskCompletionSource _changed = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private Task? _reading;
    private Task? _readingOut;

    public ProxyProcess(Launch launch, string folder, string[] arguments)
    {
        _launch = launch;
        string portFile = launch.PortFile ?? Path.Combine(folder, "ports");
        _portFile = launch.Root + portFile;
        string[] words = [.. launch.Before, launch.Binary ?? Binary, "--port-file", portFile, .. arguments];
        _command = string.Join(' ', words);
        ProcessStartInfo start = new(words[0], words[1..])
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            WorkingDirectory = folder,
        };
        foreach ((string key, string value) in launch.Environment)
        {
            start.Environment[key] = value;
        }

        _process = Process.Start(start)!;
        if (launch.ReadLog)
        {
            StartReading();
        }
    }

    /// <summary>The native binary under test.</summary>
    public static string Binary => field ??= FindBinary();

    public int Id => _process.Id;

    public bool HasExited => _process.HasExited;

    /// <summary>The bound addresses, in the order of the listens.</summary>
    public IReadOnlyList<string> Addresses { get; private set; } = [];

    public string PortFilePath => _portFile;

    public int Port => PortOf(0);

    public IReadOnlyList<LogLine> Lines
    {
        get
        {
            lock (_lines)
            {
                return [.. _lines];
            }
        }
    }

    public string RawLog
    {
        get
        {
            lock (_lines)
            {
                return string.Join('\n', _raw);
            }
        }
    }

    /// <summary>Resident memory in bytes.</summary>
    public long Resident
    {
        get
        {
            string line = File.ReadLines($"/proc/{Id}/status").First(
                l => l.StartsWith("VmRSS", StringComparison.Ordinal));
            return long.Parse(line.Split(' ')[^2], CultureInfo.InvariantCulture) * 1024;
        }
    }

    /// <summary>Processor time used so far, in milliseconds.</summary>
    public double Processor
    {
        get
        {
            _process.Refresh();
            return _process.TotalProcessorTime.TotalMilliseconds;
        }
    }

    public int Descriptors => Directory.GetFiles($"/proc/{Id}/fd").Length;

    public int Threads => Directory.GetDirectories($"/proc/{Id}/task").Length;

    public int PortOf(int listen) => ((IPEndPoint)Endpoint(listen)).Port;

    /// <summary>Where to connect to reach that listen, over loopback.</summary>
    public EndPoint Endpoint(int listen = 0)
    {
        string address = Addresses[listen];
        if (address.StartsWith("unix:", StringComparison.Ordinal))
        {
            return new UnixDomainSocketEndPoint(_launch.Root + address["unix:".Length..]);
        }

        IPEndPoint end = IPEndPoint.Parse(address);
        return end.Address.Equals(IPAddress.IPv6Any) || end.Address.Equals(IPAddress.Any)
            ? new IPEndPoint(IPAddress.Loopback, end.Port)
            : end;
    }

    public async Task Ready()
    {
        await Wait.Until(
            () => File.Exists(_portFile) || _process.HasExited,
            $"the port file of: {_command}");
        if (!File.Exists(_portFile))
        {
            await Exit();
            Assert.Fail($"exit status {_process.ExitCode} instead of a start: {_command}\n{RawLog}");
        }

        Addresses = File.ReadAllLines(_portFile);
    }

    public void StartReading()
    {
        _reading ??= ReadAsync();
        _readingOut ??= ReadOutAsync();
    }

    /// <summary>Nobody will ever read the log.</summary>
    public void CloseLog()
    {
        _process.StandardError.Close();
        _reading = Task.CompletedTask;
    }

    /// <summary>The first line of that event which holds, past or to come.</summary>
    public async Task<LogLine> Line(string name, Func<LogLine, bool>? where = null, double seconds = 20) =>
        (await LinesOf(name, 1, where, seconds))[0];

    /// <summary>The line of a connection at its end.</summary>
    public Task<LogLine> Connection(Func<LogLine, bool>? where = null, double seconds = 20) =>
        Line("connection", where, seconds);

    /// <summary>The line of the connection of this client.</summary>
    public Task<LogLine> Connection(Peer client, double seconds = 20) => Connection(client.Local, seconds);

    public Task<LogLine> Connection(string client, double seconds = 20) =>
        Line("connection", l => l["client"] == client, seconds);

    public async Task<List<LogLine>> LinesOf(
        string name, int count, Func<LogLine, bool>? where = null, double seconds = 20)
    {
        long start = Environment.TickCount64;
        while (true)
        {
            Task changed;
            List<LogLine> found;
            lock (_lines)
            {
                found = [.. _lines.Where(l => l.Event == name && (where is null || where(l)))];
                changed = _changed.Task;
            }

            if (found.Count >= count)
            {
                return found;
            }

            double left = seconds - ((Environment.TickCount64 - start) / 1000.0);
            if (left <= 0)
            {
                throw new TimeoutException(
                    $"{found.Count} of {count} lines event={name} within {seconds} s:\n{Tail(RawLog)}");
            }

            await Task.WhenAny(
                changed, Task.Delay(TimeSpan.FromSeconds(left), TestContext.Current.CancellationToken));
            TestContext.Current.CancellationToken.ThrowIfCancellationRequested();
        }
    }

    /// <summary>Warnings and errors fail the test, unless it expects the event.</summary>
    public ProxyProcess Tolerate(params string[] events)
    {
        _tolerated.UnionWith(events);
        return this;
    }

    public void Signal(int signal)
    {
        [DllImport("libc", SetLastError = true)]
        [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
        static extern int kill(int pid, int signal);

        if (!_process.HasExited)
        {
            const int GoneMeanwhile = 3; // ESRCH
            int error = kill(Id, signal) == 0 ? 0 : Marshal.GetLastPInvokeError();
            Assert.True(error is 0 or GoneMeanwhile, $"kill({Id}, {signal}): errno {error}");
        }
    }

    /// <summary>Waits for the end of the process and of its log.</summary>
    public async Task<int> Exit(double seconds = 20)
    {
        await _process.WaitForExitAsync().Within($"the end of: {_command}\n{Tail(RawLog)}", seconds);
        StartReading();
        await Task.WhenAll(_reading!, _readingOut!).Within($"the end of the log of: {_command}");
        return _process.ExitCode;
    }

    public Task<int> Stop(double seconds = 20)
    {
        Signal(SigTerm);
        return Exit(seconds);
    }

    /// <summary>
    /// The end of every proxy: drained in time, exit status as expected, nothing bad in the log.
    /// </summary>
    public async Task End(bool failed)
    {
        try
        {
            StartReading();
            if (failed)
            {
                Show();
                return;
            }

            int status = await Stop();
            Assert.True(
                status == _launch.ExpectedExit, $"exit status {status} of: {_command}\n{Tail(RawLog)}");
            CheckLog();
        }
        catch
        {
            Show();
            throw;
        }
        finally
        {
            if (!_process.HasExited)
            {
                Signal(SigKill);
                await _process.WaitForExitAsync();
            }

            _process.Dispose();
        }
    }

    private static string FindBinary()
    {
        string? named = Environment.GetEnvironmentVariable("TCPPROXY_BIN");
        if (!string.IsNullOrEmpty(named))
        {
            return File.Exists(named)
                ? named
                : throw new FileNotFoundException("TCPPROXY_BIN names no file", named);
        }

        for (DirectoryInfo? at = new(AppContext.BaseDirectory); at is not null; at = at.Parent)
        {
            string built = Path.Combine(at.FullName, "out", "tcpproxy");
            if (File.Exists(built))
            {
                return built;
            }
        }

        throw new InvalidOperationException("no binary to test: build it, or set TCPPROXY_BIN");
    }

    private static string Tail(string text) => text.Length < 6000 ? text : "..." + text[^6000..];

    private void Show() =>
        TestContext.Current.TestOutputHelper?.WriteLine($"$ {_command}\n{Tail(RawLog)}\n{_stdout}");

    private void CheckLog()
    {
        Assert.True(_stdout.Length == 0, $"on stdout: {_stdout}");
        lock (_lines)
        {
            if (_launch.MayBreakOff)
            {
                _faults.RemoveAll(f => f.EndsWith(_raw[^1], StringComparison.Ordinal));
                _lines.RemoveAll(l => l.Raw == _raw[^1]); // cut behind a value, it reads like a line without a level
            }

            Assert.True(_faults.Count == 0, $"not a log line: {string.Join('\n', _faults)}");
            LogLine? bad = _lines.Find(
                l => l.Level is not ("debug" or "info") && !_tolerated.Contains(l.Event));
            Assert.True(bad is null, $"not expected in the log: {bad}");
            string? crash = _raw.Find(
                l => l.Contains("Unhandled", StringComparison.Ordinal) || l.Contains("   at "));
            Assert.True(crash is null, $"an exception in the log: {crash}");
        }
    }

    private async Task ReadAsync()
    {
        while (await _process.StandardError.ReadLineAsync() is { } raw)
        {
            lock (_lines)
            {
                _raw.Add(raw);
                if (_launch.Chatter.Any(c => raw.StartsWith(c, StringComparison.Ordinal)))
                {
                    continue;
                }

                try
                {
                    _lines.Add(LogLine.Parse(raw));
                }
                catch (Exception e) when (e is FormatException or System.Text.Json.JsonException)
                {
                    _faults.Add($"{e.Message} | {raw}");
                }

                TaskCompletionSource changed = _changed;
                _changed = new(TaskCreationOptions.RunContinuationsAsynchronously);
                changed.SetResult();
            }
        }
    }

    private async Task ReadOutAsync() => _stdout.Append(await _process.StandardOutput.ReadToEndAsync());
}
