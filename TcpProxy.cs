// tcpproxy - a TCP proxy in one file.
//
// Copyright (c) 2026 the tcpproxy authors. MIT licence; its text stands in README.md under "Licence".
// The descendant of the C++ TCP Proxy Server by Arash Partow: its words (acceptor, bridge, upstream, downstream)
// and its four arguments are kept.
//
// THE LIFE OF A CONNECTION             the numbers stand again in the code:  grep -n "// (4)" TcpProxy.cs
//
//      client (downstream)                      proxy                        server (upstream)
//            |  ---- connects --->  (1) Acceptor                                   |
//            |                      (2) ConnectionLimit                            |
//            |  --- its words --->      FirstBytes, where a route asks for them    |
//            |                      (3) UpstreamPool  picks a server               |
//            |                      (4) Dialer        ---- connects --->           |
//            |                          FirstBytes    ---- header, words --->      |
//            |  ======= up =======> (5) Bridge, two Pumps  ======= up =======>     |
//            |  <===== down ======  (6)                    <===== down ======      |
//            |  <--- FIN / RST ---> (7)               <--- FIN / RST --->          |
//                                   (8) one log line, the slot given back
//
//   (1) An Acceptor accepts a socket and hands it over. Nothing stops it: out of descriptors it refuses and goes on.
//   (2) Admission says yes or no: is there room for one more connection, of the route, of that address, at that rate? In
//       between, in a route that asks for it, a PROXY header tells who the client is, and a TLS hello whom it wants.
//   (3) Names are resolved, and one of the servers that are up is picked as --balance says; where all are full, one waits.
//   (4) It is dialled, in time; if it does not answer, the next one is, and the client does not notice. It gets a PROXY
//       header if the route sends one, and the bytes that were read in (2).
//   (5) A Bridge owns both sockets. Two Pumps copy, one a direction, each with at most one buffer.
//   (6) A Pump that waits holds no buffer; a Pump that cannot send does not receive: that is all of backpressure.
//       A stream is left to the kernel, which moves it from socket to socket without copying.
//   (7) FIN is passed on and the other direction lives on. Anything else that ends a bridge (RST, a timeout) resets
//       both sides, so that neither takes a cut stream for a whole one. The first cause is the reason.
//   (8) One log line says who, where, how long, how many bytes each way, and why it ended.
//
// THE PATH A BYTE TAKES                measured on two cores over loopback, against HAProxy and Go's io.Copy in one run
//
//   as a message  epoll tells the runtime, whose loop receives into an array rented for that moment and runs the Pump on
//                 its own thread; the Pump sends what the kernel takes at once, which is nearly always all, and asks for
//                 more. A recv that finds nothing (the runtime's own first attempt), the recv that finds it, a send: three
//                 system calls to HAProxy's two and a half. Six parts in seven of the time are the kernel's.
//   as a stream   after four full buffers in a row: splice(2) into the pipe of the thread and out of it, 256 KB at a time.
//                 A quarter of HAProxy's processor time per byte, two thirds of Go's. What the target does not take at
//                 once leaves the pipe as a rented buffer, so that a pipe is empty whenever its thread does other work,
//                 a connection holds none, and one pipe a thread is enough.
//                 Where there is no splice, or it is off, the same 256 KB are received and sent: half of HAProxy's time, a
//                 tenth more than Go's splice. After 1 MB without a wait a Pump stands back, and its event loop rings itself
//                 to come back to it.
//   not at all    a silent connection holds no buffer and no pipe: 3.1 KB of objects (HAProxy: 3.3), of which the runtime's
//                 two sockets with the event arguments of their pending receives are two thirds. So no task, no delegate and
//                 no event argument is kept that something else could stand for.
//
//   Threads share nothing on that path: a socket belongs to one event loop, buffers come from the thread's own cache, counters
//   are the pump's. What is shared is touched once a connection (the sweep's list, the log's queue, the limits' counts).
//
// RULES OF OWNERSHIP                   cited in the code as "rule 3"
//
//   1  A socket has one owner: the Acceptor until it hands it over, then Proxy.ServeAsync, then the Bridge.
//   2  A buffer has one holder, the ReceiveBuffer of a Pump, and goes back to the pool exactly once.
//   3  A Bridge starts with two references, one a Pump. The release that reaches zero closes both sockets;
//      the count never rises again. Abort closes them earlier, which makes both Pumps end and release.
//   4  The reason of an end is written once, by CompareExchange from null.
//   5  Nothing below calls back upward, but that a Pump tells its owner of its end: a task that waited for it instead
//      would cost every silent connection 200 bytes.
//   6  Continuations run on the event loop's own threads, so nothing in them may block. What would block (name
//      look-ups, the log) has a thread of its own; timeouts are found by one sweep, not by a timer a connection.
//
// MAP                                  to enter a room:  grep -n "^// == " TcpProxy.cs
//
//    1 PROGRAM     Main, exit status, signals
//    2 OPTIONS     the one table; command line and file to settings; help
//    3 PROXY       routes; ServeAsync is steps (2) to (8); start, drain, stop
//    4 ACCEPTOR    bind every kind of address, accept loop, out of descriptors
//    5 ADMISSION   limits on connections: how many, how fast, of the route and of an address
//    6 UPSTREAMS   servers: choice, retry, queue, down and up
//    7 CONNECT     resolve names, dial addresses
//    8 BRIDGE      ref-counted owner of both sockets; reasons; timeouts
//    9 PUMP        one direction: receive, send; the buffer; byte rates
//   10 TAPS        what looks into a direction, or changes it
//   11 PREREAD     PROXY protocol in and out, TLS server name
//   12 OBSERVE     log lines, written off the data path
//   13 PLATFORM    the sweep, addresses, units, text, libc
//
// A section names types of later sections only, never of earlier ones (Unit/MapTests.cs holds that true).

using System;
using System.Buffers;
using System.Buffers.Binary;
using System.Collections;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using System.Threading.Tasks.Sources;
using Microsoft.Win32.SafeHandles;

[assembly: DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]

namespace TcpProxy;

// == 1  PROGRAM =====================================================================================================
// Reads the command line, does what it says, turns the outcome into an exit status. All that is written to stderr
// outside of the log is one line, "tcpproxy: error: ...", in lower case and without a final period.

internal static class ExitStatus
{
    internal const int Done = 0;
    internal const int Failed = 1; // at run time: cannot bind, --once or --wait-for did not succeed
    internal const int Usage = 2; // the command line or the file is wrong; nothing was started
}

internal static class Program
{
    private static async Task<int> Main(string[] args)
    {
        try
        {
            Settings settings = CommandLine.Parse(args);
            return settings.Command switch
            {
                Command.ShortHelp => Print(Help.Short()),
                Command.FullHelp => Print(Help.Full()),
                Command.Version => Print($"tcpproxy {Help.Version}\n"),
                Command.CheckConfig => Print($"configuration is valid: {Text.Count(settings.Routes.Count, "route")}\n"),
                Command.WaitFor => await UpstreamPool.WaitForAsync(settings.WaitFor!, settings.WaitTimeout) is { } failure
                    ? Fail(ExitStatus.Failed, failure) : ExitStatus.Done,
                _ => await RunAsync(settings),
            };
        }
        catch (FormatException e)
        {
            return Fail(ExitStatus.Usage, e.Message);
        }
        catch (IOException e)
        {
            return Fail(ExitStatus.Failed, e.Message);
        }
    }

    private static async Task<int> RunAsync(Settings settings)
    {
        EventLoop.Configure(settings.Threads);
        Descriptors.RaiseLimit();
        Proxy proxy = new(settings);
        using PosixSignalRegistration term = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Stop);
        using PosixSignalRegistration interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Stop);
        return await proxy.RunAsync() ? ExitStatus.Done : ExitStatus.Failed;

        void Stop(PosixSignalContext context)
        {
            context.Cancel = true; // the runtime would end the process
            proxy.Stop();
        }
    }

    private static int Print(string text) =>
        StandardStream.TryWrite(StandardStream.Output, Encoding.UTF8.GetBytes(text)) ? ExitStatus.Done : ExitStatus.Failed;

    private static int Fail(int status, string message)
    {
        StandardStream.TryWrite(
            StandardStream.Error, Encoding.UTF8.GetBytes($"tcpproxy: error: {Text.Escape(message)}\n"));
        return status;
    }
}

// == 2  OPTIONS =====================================================================================================
// An option is one row of Option.Table. The parser, both helps, the configuration file and the README's reference
// (Unit/ReadmeTests.cs) are made from that row. Anything wrong in what was typed is a FormatException whose message
// is the line that the user reads: where, what was wrong, what was probably meant.

/// <summary>Where an option holds.</summary>
internal enum Scope
{
    Route, // for the route it stands in, or for every route when it stands before the first listen
    Process, // for the process, wherever it stands
    CommandLine, // the same, and has no meaning in a file
}

/// <summary>One option. An empty <paramref name="value"/> name makes it a flag; <paramref name="fallback"/> is
/// applied by the same code as a typed value, so the default that help shows is the one in force. The first
/// sentence of <paramref name="help"/> is the short help.</summary>
internal sealed class Option(
    string name, char letter, string value, string group, Scope scope, string fallback, string help,
    Action<Settings, RouteSettings, string> apply)
{
    internal string Name { get; } = name;
    internal char Letter { get; } = letter;
    internal string Value { get; } = value;
    internal string Group { get; } = group;
    internal Scope Scope { get; } = scope;
    internal string Default { get; } = fallback;
    internal string Help { get; } = help;
    internal Action<Settings, RouteSettings, string> Apply { get; } = apply;
    internal bool IsFlag => Value.Length == 0;

    internal static readonly Option[] Table =
    [
        new("listen", 'l', "ADDR", "route", Scope.Route, "",
            "Accept clients at ADDR; starts a route. The options that follow belong to it; those before the first "
            + "--listen are defaults for every route.",
            (_, r, v) => r.Listen = ListenAddress.Parse(v)),
        new("upstream", 'u', "ADDR", "route", Scope.Route, "",
            "Relay them to ADDR; of several, and of the addresses of a name, to the one that --balance picks. Settings may "
            + "follow: weight=N is its share (1; 0 to 256, 0 = no new connections), backup keeps it for when no other can "
            + "take one, max-connections=N bounds it (off), slow-start=TIME is how long its share grows when it is back "
            + "after a failure (10s), name=TEXT is what the log and --balance source call it (as it is written).",
            (_, r, v) => r.Add(UpstreamSettings.Parse(v))),
        new("sni", '\0', "NAME[,NAME...]", "route", Scope.Route, "",
            "The upstreams that follow serve the TLS clients that ask for NAME. *.example.com stands for all names below "
            + "example.com; an exact name wins over it, and a longer one over a shorter. Upstreams before any --sni serve "
            + "all others; without them, others are refused. TLS goes through as it is.",
            (_, r, v) => r.ServerNames = ServerName.ParseList(v)),
        new("name", '\0', "TEXT", "route", Scope.Route, "",
            "Call the route TEXT in the log. Without it, it is called as its listen address is written.",
            (_, r, v) => r.Name = v.Length > 0 ? v : throw new FormatException("a name has at least one character")),

        new("balance", '\0', "POLICY", "balance", Scope.Route, "leastconn",
            "Pick servers by POLICY, in proportion to their weights. leastconn: the one with the fewest connections, "
            + "roundrobin: each in turn, random: the better of two draws, source: always the same for a client's address "
            + "(Maglev; on every proxy with the same upstreams), first: the first that has room for one more.",
            (_, r, v) => r.Pool.Policy = (Policy)Text.ParseWord(
                v, "policy", "leastconn", "roundrobin", "random", "source", "first")),

        new("connect-timeout", '\0', "TIME", "connect", Scope.Route, "5s",
            "Give up a server that does not answer within TIME, the look-up of its name included. With --retries a client "
            + "waits for up to 1 + N times as long.",
            (_, r, v) => r.Connect.Timeout = Units.ParseTime(v)),
        new("retries", '\0', "N", "connect", Scope.Route, "3",
            "After a failed connect, try up to N other servers of the route. The other addresses of a name do not count: "
            + "they are all tried, and are dialled beside one that has not answered within 250 ms.",
            (_, r, v) => r.Connect.Retries = Units.ParseCount(v)),
        new("source", '\0', "ADDR", "connect", Scope.Route, "",
            "Connect to servers from this local address. Only servers of its family (IPv4 or IPv6) can be reached.",
            (_, r, v) => r.Connect.Source = IPAddress.TryParse(v, out IPAddress? address) ? address
                : throw new FormatException($"'{v}' is not an IP address")),
        new("send-proxy", '\0', "off|v1|v2", "connect", Scope.Route, "off",
            "Tell servers the client's address in a PROXY protocol header. The built-in servers get none.",
            (_, r, v) => r.Connect.SendProxy = (ProxyVersion)Text.ParseWord(v, "version", "off", "v1", "v2")),
        new("resolve", '\0', "TIME", "connect", Scope.Route, "30s",
            "Keep the addresses of a server's name for TIME. A name is resolved when it is first needed, again when "
            + "TIME has passed or its addresses fail; while it does not resolve, the last known addresses serve.",
            (_, r, v) => r.Connect.Resolve = Units.ParseTime(v)),

        new("max-fails", '\0', "N", "health", Scope.Route, "3",
            "Take a server for down after N failed connects, none later than --fail-timeout after the one before. When "
            + "all are down, all are tried. A lone server is never taken for down.",
            (_, r, v) => r.Pool.MaxFails = Units.ParseCount(v)),
        new("fail-timeout", '\0', "TIME", "health", Scope.Route, "10s",
            "Leave a server that is down alone for TIME; then one client tries it, and the others when that went well.",
            (_, r, v) => r.Pool.FailTimeout = Units.ParseTime(v)),
        new("check", '\0', "TIME", "health", Scope.Route, "off",
            "Connect to each server every TIME (10 % more or less) to see whether it is up.",
            (_, r, v) => r.Pool.Check = Units.ParseTime(v)),
        new("check-rise", '\0', "N", "health", Scope.Route, "2",
            "A server is up again after N checks in a row that went well.",
            (_, r, v) => r.Pool.CheckRise = Units.ParseCount(v, least: 1)),
        new("check-fall", '\0', "N", "health", Scope.Route, "3",
            "A server is down after N checks in a row that did not.",
            (_, r, v) => r.Pool.CheckFall = Units.ParseCount(v, least: 1)),
        new("check-send", '\0', "TEXT", "health", Scope.Route, "",
            "A check sends TEXT. \\n \\r \\t \\\\ and \\xNN stand for bytes.",
            (_, r, v) => r.Pool.CheckSend = Text.Unescape(v)),
        new("check-expect", '\0', "TEXT", "health", Scope.Route, "",
            "A check goes well only if TEXT is in the first 16k of the answer. Escapes as in --check-send.",
            (_, r, v) => r.Pool.CheckExpect = Text.Unescape(v)),

        new("max-connections", '\0', "N", "limits", Scope.Route, "off",
            "Close at once what comes beyond N connections and finds no place in the --queue. Before the first --listen it "
            + "also bounds the sum over all routes.",
            (_, r, v) => r.MaxConnections = Units.ParseCount(v)),
        new("max-connections-per-ip", '\0', "N", "limits", Scope.Route, "off",
            "The same for one client address, which is the one in the PROXY header where --accept-proxy reads one.",
            (_, r, v) => r.Limits.MaxPerAddress = Units.ParseCount(v)),
        new("ip6-prefix", '\0', "BITS", "limits", Scope.Route, "64",
            "Of IPv6, so many bits are one client address.",
            (_, r, v) => r.Limits.Ip6Prefix = Units.ParseCount(v, least: 1, most: 128)),
        new("connect-rate", '\0', "N/s [BURST]", "limits", Scope.Route, "off",
            "Close at once what comes faster than N connections a second (N/m: a minute). Up to BURST may come at once (N).",
            (_, r, v) => r.Limits.Rate = ConnectRate.Parse(v)),
        new("connect-rate-per-ip", '\0', "N/s [BURST]", "limits", Scope.Route, "off",
            "The same for one client address. A route keeps count of 131,072 addresses in 3 MB; where there are too many with "
            + "connections, some are not counted, and the log says so.",
            (_, r, v) => r.Limits.RatePerAddress = ConnectRate.Parse(v)),
        new("refuse", '\0', "close|reset", "limits", Scope.Route, "close",
            "Close clients that are refused in good order (FIN), or reset them (RST). Of a flood of them the log has 100 lines "
            + "a second, and how many were left out.",
            (_, r, v) => r.Limits.IsResetting = Text.ParseWord(v, "way", "close", "reset") == 1),
        new("queue", '\0', "N", "limits", Scope.Route, "0",
            "When every server has its max-connections, or the route, let up to N clients wait in order. Beyond that they "
            + "are closed at once.",
            (_, r, v) => r.Pool.Queue = Units.ParseCount(v)),
        new("queue-timeout", '\0', "TIME", "limits", Scope.Route, "5s",
            "Close a client that has waited for TIME.",
            (_, r, v) => r.Pool.QueueTimeout = Units.ParseTime(v)),
        new("max-bytes-up", '\0', "SIZE", "limits", Scope.Route, "off",
            "End a connection when exactly SIZE bytes have passed from the client.",
            (_, r, v) => r.Bridge.MaxBytesUp = Units.ParseSize(v)),
        new("max-bytes-down", '\0', "SIZE", "limits", Scope.Route, "off",
            "End a connection when exactly SIZE bytes have passed to the client.",
            (_, r, v) => r.Bridge.MaxBytesDown = Units.ParseSize(v)),
        new("rate-up", '\0', "RATE", "limits", Scope.Route, "off",
            "Let no more than RATE bytes pass from the client of each connection, as in 512k/s. What comes faster is not "
            + "received before its time, so the sender slows down. After a pause at most 50 ms' worth passes at once.",
            (_, r, v) => r.Bridge.RateUp = Units.ParseRate(v)),
        new("rate-down", '\0', "RATE", "limits", Scope.Route, "off",
            "The same, to the client.",
            (_, r, v) => r.Bridge.RateDown = Units.ParseRate(v)),
        new("rate-total-up", '\0', "RATE", "limits", Scope.Route, "off",
            "The same from all clients of the route together. Those who send have equal parts of it.",
            (_, r, v) => r.Bridge.RateTotalUp = Units.ParseRate(v)),
        new("rate-total-down", '\0', "RATE", "limits", Scope.Route, "off",
            "The same to all clients of the route together.",
            (_, r, v) => r.Bridge.RateTotalDown = Units.ParseRate(v)),
        new("max-lifetime", '\0', "TIME [JITTER]", "limits", Scope.Route, "off",
            "End a connection that is TIME old. With JITTER, a time as well, up to that much later, so that not all end at once.",
            (_, r, v) => (r.Bridge.MaxLifetime, r.Bridge.LifetimeJitter) = Units.ParseTimes(v)),

        new("idle-timeout", '\0', "TIME", "timeouts", Scope.Route, "1h",
            "End a connection in which nothing has moved for TIME.",
            (_, r, v) => r.Bridge.IdleTimeout = Units.ParseTime(v)),
        new("fin-timeout", '\0', "TIME", "timeouts", Scope.Route, "60s",
            "The same, once one side has finished sending. The other side may go on for as long as it makes progress.",
            (_, r, v) => r.Bridge.FinTimeout = Units.ParseTime(v)),
        new("keepalive", '\0', "TIME", "timeouts", Scope.Route, "60s",
            "Probe a connection that is silent for TIME (TCP keep-alive), on both sides. One that does not answer "
            + "three probes, TIME/4 apart, is dead.",
            (_, r, v) => r.Bridge.Keepalive = Units.ParseTime(v)),

        new("preread-timeout", '\0', "TIME", "timeouts", Scope.Route, "5s",
            "Reset a client whose PROXY header or TLS hello, where one is read, is not complete within TIME.",
            (_, r, v) => r.Preread.Timeout = Units.ParseTime(v)),

        new("accept-proxy", '\0', "CIDR[,CIDR...]", "client address", Scope.Route, "off",
            "Require a PROXY protocol header (version 1 or 2) from these senders, and take the address in it for the "
            + "client's. unix stands for whoever comes by a unix socket. From others no header is read.",
            (_, r, v) => r.Preread.AcceptProxy(v)),

        new("filter-up", '\0', "COMMAND", "modify", Scope.Route, "",
            "Send what clients say through COMMAND, a process for each connection: stdin is the client, stdout the server (both "
            + "are sockets). Quotes and backslashes work as in a shell, but none is run, unless it is sh:COMMAND. Its "
            + "environment has TCPPROXY_CLIENT, TCPPROXY_UPSTREAM, TCPPROXY_ROUTE; its stderr is logged. Its end with status 0 "
            + "is a FIN, and what still comes is dropped; another end is a reset. It is killed when the connection ends, or "
            + "when it writes nothing for --fin-timeout after its client has finished.",
            (_, r, v) => r.Taps.Add(new FilterSettings(v, isUp: true))),
        new("filter-down", '\0', "COMMAND", "modify", Scope.Route, "",
            "The same for what servers say.",
            (_, r, v) => r.Taps.Add(new FilterSettings(v, isUp: false))),

        new("log", '\0', "FORMAT", "observe", Scope.Process, "text",
            "Log as text (logfmt), json (the same keys) or off.",
            (s, _, v) => s.Log.Format = (LogFormat)Text.ParseWord(v, "format", "text", "json", "off")),
        new("log-file", '\0', "FILE", "observe", Scope.Process, "",
            "Append the log to FILE instead of stderr.",
            (s, _, v) => s.Log.File = Text.FileName(v)),
        new("log-level", '\0', "LEVEL", "observe", Scope.Process, "info",
            "Log debug, info, warn or error and what is worse. The line of a connection is of level info.",
            (s, _, v) => s.Log.Level = (LogLevel)Text.ParseWord(v, "level", "debug", "info", "warn", "error")),

        new("config", 'c', "FILE", "run", Scope.CommandLine, "",
            "Read options from FILE. One a line: its long name without dashes, then its value; # starts a comment. "
            + "Options on the command line win over the file's, in every route.",
            (s, _, v) => s.ConfigFile = Text.FileName(v)),
        new("check-config", '\0', "", "run", Scope.CommandLine, "",
            "Say whether the command line and the file are valid, and exit.",
            (s, _, _) => s.Command = Command.CheckConfig),
        new("drain-timeout", '\0', "TIME", "run", Scope.Process, "30s",
            "On TERM or INT stop accepting and let connections finish for up to TIME. A second signal ends at once.",
            (s, _, v) => s.DrainTimeout = Units.ParseTime(v)),
        new("threads", '\0', "N|auto", "run", Scope.Process, "auto",
            "Event loop threads. auto is one a processor.",
            (s, _, v) => s.Threads = v == "auto" ? 0 : Units.ParseCount(v, least: 1, most: 256)),
        new("buffer-size", '\0', "SIZE", "run", Scope.Route, "64k",
            "Copy at most SIZE bytes at once in a direction (256 to 16m), and four times as many while it streams, copied or "
            + "spliced (256k at most). A connection that waits holds no buffer.",
            (_, r, v) => r.Bridge.BufferSize = (int)Units.ParseSize(v, least: 256, most: 16 << 20)),
        new("splice", '\0', "auto|off", "run", Scope.Route, "auto",
            "Move streams inside the kernel (Linux, splice(2)) instead of copying them.",
            (_, r, v) => r.Bridge.IsSplicing = Text.ParseWord(v, "word", "auto", "off") == 0),
        new("pid-file", '\0', "FILE", "run", Scope.Process, "",
            "Write the process id to FILE when ready; removed at the end.",
            (s, _, v) => s.PidFile = Text.FileName(v)),
        new("port-file", '\0', "FILE", "run", Scope.Process, "",
            "When ready, write the bound addresses to FILE, one a line in the order of the listens. It is written "
            + "whole or not at all, and removed at the end: a script waits for it and knows where port 0 has led.",
            (s, _, v) => s.PortFile = Text.FileName(v)),
        new("once", '\0', "", "run", Scope.Process, "",
            "Serve one connection, then exit: 0 if it ended well, else 1.",
            (s, _, _) => s.Once = true),
        new("wait-for", '\0', "ADDR", "run", Scope.CommandLine, "",
            "Wait until a server accepts connections at ADDR, and exit: 0 if it did within --timeout, else 1.",
            (s, _, v) => (s.Command, s.WaitFor) = (Command.WaitFor, UpstreamAddress.Parse(v))),
        new("timeout", '\0', "TIME", "run", Scope.CommandLine, "30s",
            "How long --wait-for waits.",
            (s, _, v) => s.WaitTimeout = Units.ParseTime(v)),
        new("quiet", 'q', "", "run", Scope.Process, "",
            "Log warnings and errors only.",
            (s, _, _) => s.Log.Level = LogLevel.Warn),
        new("verbose", 'v', "", "run", Scope.Process, "",
            "Log everything.",
            (s, _, _) => s.Log.Level = LogLevel.Debug),
        new("help", 'h', "", "run", Scope.CommandLine, "",
            "Print help and exit. -h is short, --help is all of it.",
            (s, _, _) => s.Command = Command.FullHelp),
        new("version", 'V', "", "run", Scope.CommandLine, "",
            "Print the version and exit.",
            (s, _, _) => s.Command = Command.Version),
    ];

    internal static Option? Find(string name) => Array.Find(Table, option => option.Name == name);

    internal static Option? Find(char letter) => Array.Find(Table, option => option.Letter == letter);
}

/// <summary>An option as it was typed: where (for the message when it is wrong) and with what value.</summary>
internal readonly struct Setting(Option option, string value, string where)
{
    internal Option Option { get; } = option;
    private readonly string _value = value;
    internal string Where { get; } = where;

    /// <summary>The same with one more word.</summary>
    internal Setting With(string word) => new(Option, $"{_value} {word}", Where);

    internal void Apply(Settings settings, RouteSettings route)
    {
        try
        {
            Option.Apply(settings, route, _value);
        }
        catch (FormatException e)
        {
            throw Wrong(e.Message);
        }
    }

    internal FormatException Wrong(string what) => new($"{Where}: {what}");
}

internal static class CommandLine
{
    private const int LargestFile = 16 << 20; // bytes: /dev/zero is not a configuration

    /// <exception cref="FormatException">what was typed is wrong; the message is the line for the user</exception>
    internal static Settings Parse(IReadOnlyList<string> arguments)
    {
        List<Setting> typed = [];
        List<string> positional = [];
        Read(arguments, typed, positional);
        Settings settings = new();
        RouteSettings defaults = new();
        foreach (Option option in Option.Table)
        {
            if (option.Default.Length > 0)
            {
                option.Apply(settings, defaults, option.Default);
            }
        }

        foreach (Setting setting in typed)
        {
            if (setting.Option.Scope == Scope.CommandLine)
            {
                setting.Apply(settings, defaults);
            }
        }

        if (settings.Command == Command.FullHelp && typed.Exists(setting => setting.Where == "-h"))
        {
            settings.Command = Command.ShortHelp;
        }
        else if (settings.Command is Command.Run or Command.CheckConfig)
        {
            AddRoutes(settings, defaults, typed, positional);
        }
        else if (settings.Command == Command.WaitFor && positional.Count > 0)
        {
            throw new FormatException($"'{positional[0]}': --wait-for takes one address and serves no route");
        }

        return settings;
    }

    // ---- reading: words to settings and positional arguments

    private static void Read(IReadOnlyList<string> words, List<Setting> typed, List<string> positional)
    {
        bool optionsEnded = false;
        int options = 0; // that had been typed before the last positional word
        for (int i = 0; i < words.Count; i++)
        {
            string word = words[i];
            if (UpstreamSettings.IsOne(word))
            {
                AddSetting(word, typed, positional, options == typed.Count);
            }
            else if (optionsEnded || word.Length < 2 || word[0] != '-')
            {
                positional.Add(word);
                options = typed.Count;
            }
            else if (word == "--")
            {
                optionsEnded = true;
            }
            else if (word[1] == '-')
            {
                i += ReadLong(word, i + 1 < words.Count ? words[i + 1] : null, typed);
            }
            else
            {
                i += ReadLetters(word, i + 1 < words.Count ? words[i + 1] : null, typed);
            }
        }
    }

    /// <summary>weight=3 and the like belong to the upstream that they follow.</summary>
    private static void AddSetting(string word, List<Setting> typed, List<string> positional, bool isPositional)
    {
        if (isPositional && positional.Count > 1)
        {
            positional[^1] += $" {word}";
        }
        else if (!isPositional && typed[^1].Option.Name == "upstream")
        {
            typed[^1] = typed[^1].With(word);
        }
        else
        {
            throw new FormatException($"'{word}': a setting of an upstream stands right after its address");
        }
    }

    /// <summary>--name, --name value or --name=value; returns how many words beyond its own it took.</summary>
    private static int ReadLong(string word, string? next, List<Setting> typed)
    {
        int equals = word.IndexOf('=', StringComparison.Ordinal);
        string name = equals < 0 ? word : word[..equals];
        Option option = Option.Find(name[2..]) ?? throw Unknown(name, "--", name[2..]);
        string? given = equals < 0 ? null : word[(equals + 1)..];
        if (option.IsFlag && given is not null)
        {
            throw new FormatException($"{name}: takes no value, but '{given}' was given");
        }

        typed.Add(new Setting(option, given ?? (option.IsFlag ? "" : Value(option, name, next)), name));
        return given is null && !option.IsFlag ? 1 : 0;
    }

    /// <summary>A cluster of letters, the last of which may take a value: -qv, -l 8080, -l8080.</summary>
    private static int ReadLetters(string word, string? next, List<Setting> typed)
    {
        for (int i = 1; i < word.Length; i++)
        {
            string name = $"-{word[i]}";
            Option? option = Option.Find(word[i]);
            if (option is null)
            {
                // -timeout: an old-style long option is the likeliest mistake
                throw Option.Find(word[1..].Split('=')[0]) is { } meant
                    ? new FormatException($"{word}: unknown option; did you mean '--{meant.Name}'?")
                    : new FormatException($"{name}: unknown option; 'tcpproxy -h' lists them");
            }

            if (option.IsFlag)
            {
                typed.Add(new Setting(option, "", name));
                continue;
            }

            bool attached = i + 1 < word.Length;
            typed.Add(new Setting(option, attached ? word[(i + 1)..] : Value(option, name, next), name));
            return attached ? 0 : 1;
        }

        return 0;
    }

    private static string Value(Option option, string name, string? next) =>
        next is null ? throw new FormatException($"{name}: needs a value {option.Value}")
        : next.Length > 1 && next[0] == '-'
            ? throw new FormatException($"{name}: needs a value {option.Value}, but the option '{next}' follows")
        : next;

    private static FormatException Unknown(string where, string dashes, string name)
    {
        string? near = Text.Nearest(name, Array.ConvertAll(Option.Table, option => option.Name));
        return new FormatException(near is null ? $"{where}: unknown option; 'tcpproxy -h' lists them"
            : $"{where}: unknown option; did you mean '{dashes}{near}'?");
    }

    /// <summary>One option a line: name, blanks, value. A value may be quoted; # starts a comment.</summary>
    internal static void ReadFile(string file, string text, List<Setting> typed)
    {
        int number = 0;
        foreach (string raw in text.Split('\n'))
        {
            string at = $"{file}:{++number}";
            string line = StripComment(raw, at);
            if (line.Length == 0)
            {
                continue;
            }

            int blank = line.AsSpan().IndexOfAny(' ', '\t');
            string name = blank < 0 ? line : line[..blank];
            Option option = Option.Find(name) ?? throw Unknown($"{at}: {name}", "", name.TrimStart('-'));
            string value = blank < 0 ? "" : Unquote(line[blank..].Trim(), at);
            typed.Add(new Setting(option, value, $"{at}: {name}"));
            if (option.Scope == Scope.CommandLine)
            {
                throw typed[^1].Wrong("belongs on the command line, not in a file");
            }

            if (option.IsFlag != (value.Length == 0) || (blank < 0 && !option.IsFlag))
            {
                throw typed[^1].Wrong(option.IsFlag ? $"takes no value, but '{value}' was given"
                    : $"needs a value {option.Value}");
            }
        }
    }

    private static string StripComment(string line, string at)
    {
        bool quoted = false;
        for (int i = 0; i < line.Length; i++)
        {
            quoted ^= line[i] == '"';
            if (line[i] == '#' && !quoted && (i == 0 || char.IsWhiteSpace(line[i - 1])))
            {
                return line[..i].Trim();
            }
        }

        return quoted ? throw new FormatException($"{at}: a quote is not closed") : line.Trim();
    }

    private static string Unquote(string value, string at) =>
        value.Length < 2 || value[0] != '"' ? value
        : value.IndexOf('"', 1) == value.Length - 1 ? value[1..^1]
        : throw new FormatException($"{at}: a quoted value ends at its second quote");

    // ---- building: settings to routes

    /// <summary>The file's options stand in order; those of the command line before its first --listen then win
    /// over them in every route; a --listen on the command line adds a route of its own.</summary>
    private static void AddRoutes(
        Settings settings, RouteSettings defaults, List<Setting> typed, List<string> positional)
    {
        List<Setting> filed = [];
        if (settings.ConfigFile is { } file)
        {
            ReadFile(file, Load(file), filed);
        }

        bool isPositional = positional.Count > 0;
        int firstListen = typed.FindIndex(setting => setting.Option.Name == "listen");
        if (isPositional && (firstListen >= 0 || settings.ConfigFile is not null))
        {
            throw Stray(positional[0], settings.ConfigFile is null ? "--listen" : "--config");
        }

        int head = firstListen < 0 ? typed.Count : firstListen;
        Build(settings, defaults, CollectionsMarshal.AsSpan(filed));
        if (settings.ConfigFile is not null && typed[..head].Exists(setting => setting.Option.Name == "upstream"))
        {
            defaults.ClearUpstreams();
            settings.Routes.ForEach(route => route.ClearUpstreams());
        }

        foreach (Setting setting in typed[..head])
        {
            setting.Apply(settings, defaults);
            settings.Routes.ForEach(route => setting.Apply(settings, route));
        }

        settings.MaxConnections = defaults.MaxConnections;
        if (isPositional)
        {
            settings.Routes.Add(Positional(defaults, positional));
        }

        Build(settings, defaults, CollectionsMarshal.AsSpan(typed)[head..]);
        if (settings.Routes.Count == 0)
        {
            throw new FormatException(settings.ConfigFile is { } empty ? $"{empty}: no route: it has no listen" :
                "no route: give LISTEN and UPSTREAM, as in 'tcpproxy 8080 example.org:80', or see 'tcpproxy -h'");
        }

        settings.Routes.ForEach(route => route.Validate());
    }

    private static void Build(Settings settings, RouteSettings defaults, ReadOnlySpan<Setting> settingsInOrder)
    {
        RouteSettings current = defaults;
        foreach (Setting setting in settingsInOrder)
        {
            if (setting.Option.Name == "listen")
            {
                settings.Routes.Add(current = defaults.Clone());
                current.Where = $"{setting.Where}: ";
            }

            setting.Apply(settings, current);
        }
    }

    private static FormatException Stray(string word, string beside)
    {
        Option? meant = Option.Find(word);
        return new FormatException(meant is null
            ? $"'{word}': give the route either as LISTEN UPSTREAM or with {beside}, not both"
            : $"'{word}': unexpected argument; did you mean '--{word}'?");
    }

    /// <summary>LISTEN UPSTREAM..., or the original's LOCAL_HOST LOCAL_PORT FORWARD_HOST FORWARD_PORT.</summary>
    private static RouteSettings Positional(RouteSettings defaults, List<string> words)
    {
        RouteSettings route = defaults.Clone();
        if (words.Count >= 4 && IsHost(words[0]) && Text.IsDigits(words[1]) && IsHost(words[2]) && Text.IsDigits(words[3]))
        {
            route.Listen = At("LOCAL_PORT", words[1], v => ListenAddress.Parse($"{Bracket(words[0])}:{v}"));
            route.Upstreams.Add(At("FORWARD_PORT", words[3], v => UpstreamSettings.Parse($"{Bracket(words[2])}:{v}")));
            return words.Count == 4 ? route : throw new FormatException(
                $"'{words[4]}': unexpected argument after the four of the original form"
                + (Text.IsDigits(words[4]) ? $"; did you mean '--threads {words[4]}'?" : ""));
        }

        if (words.Count > 1 && IsHost(words[0]) && Text.IsDigits(words[1]))
        {
            throw new FormatException($"LISTEN: '{words[0]}' has no port; did you mean '{words[0]}:{words[1]}'? "
                + "(the original form is LOCAL_HOST LOCAL_PORT FORWARD_HOST FORWARD_PORT)");
        }

        route.Listen = At("LISTEN", words[0], ListenAddress.Parse);
        for (int i = 1; i < words.Count; i++)
        {
            string word = words[i];
            route.Upstreams.Add(Option.Find(word) is null ? At("UPSTREAM", word, UpstreamSettings.Parse)
                : throw new FormatException($"UPSTREAM: '{word}' is no address; did you mean '--{word}'?"));
        }

        return route;

        static string Bracket(string host) => host.Contains(':', StringComparison.Ordinal) ? $"[{host}]" : host;

        static bool IsHost(string word) => !Text.IsDigits(word)
            && (IPAddress.TryParse(word, out _) || !word.Contains(':', StringComparison.Ordinal));

        static T At<T>(string where, string word, Func<string, T> parse)
        {
            try
            {
                return parse(word);
            }
            catch (FormatException e)
            {
                throw new FormatException($"{where}: {e.Message}");
            }
        }
    }

    private static string Load(string file)
    {
        try
        {
            using FileStream stream = new(file, FileMode.Open, FileAccess.Read, FileShare.ReadWrite, bufferSize: 0);
            byte[] bytes = new byte[LargestFile + 1];
            int length = stream.ReadAtLeast(bytes, bytes.Length, throwOnEndOfStream: false);
            return length <= LargestFile ? Encoding.UTF8.GetString(bytes, 0, length).TrimStart('\ufeff')
                : throw new FormatException($"--config: {file} is larger than {LargestFile >> 20} MB");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new FormatException($"--config: cannot read {file}: {Text.Reason(e)}");
        }
    }
}

/// <summary>Both helps, made from the table.</summary>
internal static class Help
{
    private const int Width = 100;
    private const int Indent = 30; // where the text of an option starts

    internal const string Usage =
        """
        Usage:
          tcpproxy [OPTIONS] LISTEN UPSTREAM...                                one route
          tcpproxy LOCAL_HOST LOCAL_PORT FORWARD_HOST FORWARD_PORT [OPTIONS]   the same, as the original wrote it
          tcpproxy [DEFAULTS] -l LISTEN -u UPSTREAM... [OPTIONS] [-l ...]      many routes
          tcpproxy -c FILE [OPTIONS]                                           the same options from a file
          tcpproxy --wait-for HOST:PORT [--timeout 30s]                        wait until a server answers


        """;

    private const string Notes =
        """

        Addresses:
          LISTEN    HOST:PORT, [v6]:PORT, :PORT or *:PORT (all interfaces, IPv4 and IPv6), PORT (loopback only),
                    HOST:P1-P2 (a range), unix:PATH, fd:N or fd:NAME (systemd socket activation).
                    Port 0 takes a free port.
          UPSTREAM  HOST:PORT, PORT (localhost), HOST:P1-P2 (one for each port of the listen range), unix:PATH,
                    and the built-in servers echo and discard.
        Units:
          times 500ms 5s 10m 1h 7d, bare = seconds; sizes 512 64k 10m 1g, powers of 1024; 0 or off = off
        Signals:
          TERM, INT  drain: stop accepting, let connections finish; a second one ends at once
        Exit status:
          0 done, 1 failed at run time, 2 wrong usage or configuration

        Examples:
          tcpproxy 8080 echo                              try it: what you send comes back
          tcpproxy :5432 db.internal:5432                 forward a port on all interfaces
          tcpproxy 127.0.0.1 8080 example.org 80          the original's four arguments
          tcpproxy :9000 10.0.0.5:9000 10.0.0.6:9000      two servers, the less busy one gets the next client

        """;

    internal const string Version = "0.1.0"; // the one place that says it: TcpProxy.csproj reads it here

    internal static string Short() => Render(option => option.Help[..(option.Help.IndexOf(". ", StringComparison.Ordinal)
        is int end and >= 0 ? end : option.Help.Length - 1)]) + "\n'tcpproxy --help' tells more.\n";

    internal static string Full() => Render(option => option.Help) + Notes;

    private static string Render(Func<Option, string> describe)
    {
        StringBuilder text = new("tcpproxy relays TCP connections from clients to servers.\n\n" + Usage);
        string group = "";
        foreach (Option option in Option.Table)
        {
            if (option.Group != group)
            {
                text.Append(group.Length > 0 ? "\n" : "").Append(group = option.Group).Append(":\n");
            }

            string letter = option.Letter == '\0' ? "    " : $"-{option.Letter}, ";
            string head = $"  {letter}--{option.Name} {option.Value}".TrimEnd();
            text.Append(head.PadRight(Indent - 2)).Append("  ");
            string fallback = option.Default.Length > 0 ? $" ({option.Default})" : "";
            Wrap(text, describe(option) + fallback, Math.Max(head.Length + 2, Indent));
        }

        return text.ToString();
    }

    private static void Wrap(StringBuilder text, string words, int column)
    {
        foreach (string word in words.Split(' '))
        {
            if (column + word.Length > Width)
            {
                text.Length--; // the blank after the last word
                text.Append('\n').Append(' ', Indent);
                column = Indent;
            }

            text.Append(word).Append(' ');
            column += word.Length + 1;
        }

        text.Length--;
        text.Append('\n');
    }
}

// == 3  PROXY =======================================================================================================
// Wires the parts of each route together, starts them, serves every accepted client through steps (2) to (8), and
// ends: no more accepting, bridges finish in time, the last lines are written.

/// <summary>What the command line asks for.</summary>
internal enum Command
{
    Run,
    ShortHelp,
    FullHelp,
    Version,
    CheckConfig,
    WaitFor,
}

/// <summary>All that was asked for.</summary>
internal sealed class Settings
{
    internal Command Command { get; set; }
    internal string? ConfigFile { get; set; }
    internal UpstreamAddress? WaitFor { get; set; }
    internal TimeSpan WaitTimeout { get; set; }
    internal List<RouteSettings> Routes { get; } = [];
    internal LogSettings Log { get; } = new();
    internal int MaxConnections { get; set; } // over all routes; 0 = off
    internal TimeSpan DrainTimeout { get; set; }
    internal int Threads { get; set; } // 0 = one a processor
    internal string? PidFile { get; set; }
    internal string? PortFile { get; set; }
    internal bool Once { get; set; }
}

internal sealed class RouteSettings
{
    internal string? Name { get; set; }
    internal string Where { get; set; } = ""; // it was typed, for messages
    internal ListenAddress? Listen { get; set; }
    internal List<UpstreamSettings> Upstreams { get; private set; } = [];
    internal int MaxConnections { get; set; } // 0 = off
    internal LimitSettings Limits { get; private set; } = new();
    internal PoolSettings Pool { get; private set; } = new();
    internal ConnectSettings Connect { get; private set; } = new();
    internal BridgeSettings Bridge { get; private set; } = new();
    internal PrereadSettings Preread { get; private set; } = new();
    internal List<TapSettings> Taps { get; private set; } = []; // in the order of their options
    internal string[]? ServerNames { get; set; } // of the upstreams that follow

    internal string Title => Name ?? Listen!.Text;

    internal RouteSettings Clone()
    {
        RouteSettings copy = (RouteSettings)MemberwiseClone();
        copy.Upstreams = [.. Upstreams];
        copy.Limits = Limits.Clone();
        copy.Pool = Pool.Clone();
        copy.Connect = Connect.Clone();
        copy.Bridge = Bridge.Clone();
        copy.Preread = Preread.Clone();
        copy.Taps = [.. Taps];
        return copy;
    }

    internal void Add(UpstreamSettings upstream)
    {
        upstream.ServerNames = ServerNames;
        Upstreams.Add(upstream);
    }

    internal void ClearUpstreams()
    {
        Upstreams.Clear();
        ServerNames = null;
    }

    /// <exception cref="FormatException">the parts do not fit together</exception>
    internal void Validate()
    {
        string listen = Listen!.Text;
        if (Upstreams.Count == 0)
        {
            throw new FormatException($"{Where}route {Title}: no upstream: where shall clients of {listen} be relayed to? "
                + $"Try '{listen} echo', or -u ADDR");
        }

        foreach (UpstreamAddress upstream in Upstreams.ConvertAll(upstream => upstream.Address))
        {
            if (upstream.PortCount > 1 && upstream.PortCount != Listen.PortCount)
            {
                throw new FormatException($"{Where}route {Title}: upstream {upstream.Text} has {upstream.PortCount} ports, "
                    + $"but {listen} has {Listen.PortCount}; give as many, or one for all");
            }
        }

        ValidateNames();
    }

    private void ValidateNames()
    {
        Dictionary<string, string> groups = [];
        foreach (string[] names in Upstreams.ConvertAll(upstream => upstream.ServerNames ?? []))
        {
            foreach (string name in names)
            {
                string group = string.Join(',', names);
                if (!groups.TryAdd(name, group) && groups[name] != group)
                {
                    throw new FormatException($"{Where}route {Title}: --sni: {name} stands in two groups of upstreams");
                }
            }
        }

        if (ServerNames is not null && !Upstreams.Exists(upstream => upstream.ServerNames == ServerNames))
        {
            throw new FormatException($"{Where}route {Title}: --sni {string.Join(',', ServerNames)}: no upstream follows; "
                + "write --sni NAME -u ADDR");
        }
    }
}

/// <summary>A route at run time.</summary>
internal sealed class Route
{
    private readonly Dictionary<string, UpstreamPool> _named = []; // *.example.com is .example.com here
    private long _rate; // the state of its connect rate

    internal Route(RouteSettings settings, ConnectionLimit processLimit, Log log)
    {
        Settings = settings;
        Title = settings.Title;
        Limit = new ConnectionLimit(settings.MaxConnections, processLimit);
        Line = settings.Pool.Queue == 0 ? null
            : new WaitingLine(settings.Pool.Queue, settings.Pool.QueueTimeout, CloseReason.LimitReached);
        Refusals = new Refusals(Title, log);
        Addresses = settings.Limits.HasAddresses ? new AddressTable(settings.Limits, Title, log) : null;
        Rates = settings.Bridge.HasRates ? new Rates(settings.Bridge) : null;
        foreach (UpstreamSettings upstream in settings.Upstreams)
        {
            string group = Group(upstream);
            UpstreamPool? known = group.Length == 0 ? Pool : _named.GetValueOrDefault(Key(upstream.ServerNames![0]));
            if (known is null)
            {
                UpstreamPool pool = new(
                    settings.Upstreams.FindAll(one => Group(one) == group), settings.Pool, settings.Connect, Title, log);
                Pools.Add(pool);
                Pool = group.Length == 0 ? pool : Pool;
                Array.ForEach(upstream.ServerNames ?? [], name => _named[Key(name)] = pool);
            }
        }

        NeedsName = _named.Count > 0;
        IsPlain = !NeedsName && !settings.Preread.HasSenders && settings.Connect.SendProxy == ProxyVersion.Off;

        static string Group(UpstreamSettings upstream) => string.Join(',', upstream.ServerNames ?? []);

        static string Key(string name) => name.TrimStart('*');
    }

    internal RouteSettings Settings { get; }
    internal string Title { get; }
    internal ConnectionLimit Limit { get; }
    internal WaitingLine? Line { get; } // for room among the connections
    internal Refusals Refusals { get; }
    internal AddressTable? Addresses { get; }
    internal Rates? Rates { get; }
    internal List<UpstreamPool> Pools { get; } = [];
    internal UpstreamPool? Pool { get; } // for those whom no --sni names
    internal bool NeedsName { get; }

    /// <summary>It needs no first bytes.</summary>
    internal bool IsPlain { get; }

    /// <summary>Null when there is room for one more.</summary>
    internal CloseReason? TryEnter() =>
        Settings.Limits.Rate is { } rate && !rate.TryTake(ref _rate, Stopwatch.GetTimestamp()) ? CloseReason.RateReached
        : Line is not { Count: > 0 } && Limit.TryEnter() ? null : CloseReason.LimitReached;

    internal void Leave()
    {
        Limit.Leave();
        if (Line is { Count: > 0 } line)
        {
            line.Serve();
        }
    }

    /// <summary>The servers of a TLS name: of itself, or of the longest *.NAME that it is below of.</summary>
    internal UpstreamPool? PoolOf(string? name)
    {
        UpstreamPool? pool = null;
        for (int dot = 0; name is not null && dot >= 0 && !_named.TryGetValue(name[dot..], out pool);)
        {
            dot = name.IndexOf('.', dot + 1);
        }

        return pool ?? Pool;
    }
}

internal sealed class Proxy
{
    private const int LastLines = 500; // ms for bridges that were cut to end, and again for the last lines of the log

    private readonly Settings _settings;
    private readonly Log _log;
    private readonly List<Acceptor> _acceptors = []; // owned; disposed by StopAccepting
    private readonly List<UpstreamPool> _pools = [];
    private readonly List<string> _files = []; // written by us, so ours to remove
    private readonly TaskCompletionSource _stopping = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource _idle = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private int _serving = 1; // connections, and one for the accept loops as long as they run
    private int _signals;
    private int _onceTaken;
    private bool _onceFailed;

    internal Proxy(Settings settings)
    {
        _settings = settings;
        _onceFailed = settings.Once; // until its connection has ended well
        _log = new Log(settings.Log);
    }

    /// <summary>Binds, serves, drains. False when --once was asked for and its connection failed.</summary>
    /// <exception cref="IOException">it cannot start: an address is taken, a file cannot be written</exception>
    internal async Task<bool> RunAsync()
    {
        _log.Start();
        try
        {
            Bind();
            _settings.Routes.ForEach(route => route.Taps.ForEach(tap => tap.Open(_log)));
            WriteFiles();
            _acceptors.ForEach(acceptor => _ = acceptor.RunAsync());
            _pools.ForEach(pool => pool.StartChecks());
            await _stopping.Task;
            await DrainAsync();
        }
        finally
        {
            StopAccepting();
            _files.ForEach(WholeFile.Remove);
            _settings.Routes.ForEach(route => route.Taps.ForEach(tap => tap.Close()));
            _log.Stop(LastLines);
        }

        return !_onceFailed;
    }

    /// <summary>The first call drains, the second ends at once.</summary>
    internal void Stop()
    {
        bool isFirst = Interlocked.Increment(ref _signals) == 1;
        if (!isFirst || _settings.DrainTimeout > TimeSpan.Zero)
        {
            _ = EndWithinAsync(isFirst ? _settings.DrainTimeout : TimeSpan.Zero);
        }

        _stopping.TrySetResult();
    }

    /// <summary>What then still waits for a name server is left behind.</summary>
    private async Task EndWithinAsync(TimeSpan patience)
    {
        Sweep.StopAllAt(Environment.TickCount64 + (long)patience.TotalMilliseconds);
        await Task.Delay(patience + TimeSpan.FromMilliseconds(LastLines));
        _idle.TrySetResult();
    }

    // ---- start and end

    private void Bind()
    {
        ConnectionLimit processLimit = new(_settings.MaxConnections, null);
        List<TimeSpan> bounds = [_settings.DrainTimeout];
        foreach (RouteSettings settings in _settings.Routes)
        {
            Route route = new(settings, processLimit, _log);
            _pools.AddRange(route.Pools);
            BridgeSettings bridge = settings.Bridge;
            int first = _acceptors.Count;
            bounds.AddRange(settings.Pool.Check, settings.Pool.Queue > 0 ? settings.Pool.QueueTimeout : TimeSpan.Zero);
            bounds.AddRange(settings.Connect.Timeout, route.IsPlain ? TimeSpan.Zero : settings.Preread.Timeout,
                bridge.IdleTimeout, bridge.FinTimeout, bridge.MaxLifetime,
                bridge.MaxBytesUp > 0 || bridge.MaxBytesDown > 0 ? bridge.QuotaGrace : TimeSpan.Zero);
            try
            {
                Acceptor.Bind(
                    settings.Listen!, _log, (client, portIndex) => Accepted(route, portIndex, client), _acceptors);
            }
            catch (Exception e) when (e is SocketException or IOException)
            {
                throw new IOException($"route {route.Title}: cannot listen on {settings.Listen!.Text}: {Text.Reason(e)}");
            }

            string bound = settings.Listen!.PortCount == 1 ? _acceptors[first].Address : settings.Listen.Text;
            _log.Listening(route.Title, bound, string.Join(' ', settings.Upstreams.ConvertAll(upstream => upstream.Address.Text)));
        }

        Sweep.Start(bounds);
    }

    private void WriteFiles()
    {
        StringBuilder ports = new();
        _acceptors.ForEach(acceptor => ports.Append(acceptor.IsTwin ? "" : $"{acceptor.Address}\n"));
        Write(_settings.PidFile, $"{Environment.ProcessId}\n");
        Write(_settings.PortFile, ports.ToString());

        void Write(string? path, string text)
        {
            if (path is not null && WholeFile.Write(path, text))
            {
                _files.Add(path);
            }
        }
    }

    private void StopAccepting()
    {
        _acceptors.ForEach(acceptor => acceptor.Dispose());
        _acceptors.Clear();
    }

    private async Task DrainAsync()
    {
        StopAccepting();
        _pools.ForEach(pool => pool.StopChecks());
        if (!_settings.Once)
        {
            _log.Count(LogLevel.Info, "draining", "connections", Volatile.Read(ref _serving) - 1);
        }

        Leave();
        await _idle.Task;
        _log.Event(LogLevel.Info, "stopped", "");
    }

    private void Leave()
    {
        if (Interlocked.Decrement(ref _serving) == 0)
        {
            _idle.TrySetResult();
        }
    }

    // ---- one connection

    /// <summary>(1) The acceptor's hand-over: from here on the socket is ours (rule 1).</summary>
    private void Accepted(Route route, int portIndex, Socket client)
    {
        if (_settings.Once && Interlocked.Exchange(ref _onceTaken, 1) != 0)
        {
            client.Dispose();
            return;
        }

        if (Interlocked.Increment(ref _serving) == 1)
        {
            client.Close(0); // the process has ended meanwhile
            return;
        }

        if (_settings.Once)
        {
            _stopping.TrySetResult();
        }

        _ = ServeAsync(route, portIndex, client);
    }

    /// <summary>Steps (2) to (5). Nobody awaits it, so it ends without an exception whatever happens.</summary>
    private async Task ServeAsync(Route route, int portIndex, Socket client)
    {
        ConnectionLine line = new(route.Title);
        CloseReason? reason = null;
        bool isAdmitted = false;
        Connection connection = default;
        Conversation? taps = null;
        try
        {
            line.Client = client.RemoteEndPoint;
            if (_log.Has(LogLevel.Debug))
            {
                _log.Event(LogLevel.Debug, "accepted", Text.Of(line.Client), route.Title);
            }

            reason = route.TryEnter(); // (2)
            if (reason == CloseReason.LimitReached && route.Line is { } queue)
            {
                reason = await queue.EnterAsync(route.Limit.TryEnter, client);
            }

            isAdmitted = reason is null;
            if (reason is not null)
            {
                Close(route, client, reason);
                return;
            }

            using FirstBytes? first = route.IsPlain ? null : new FirstBytes();
            reason = first is null ? null : await ReadFirstAsync(route, client, line, first);
            if (reason is null && route.Addresses is { } addresses)
            {
                line.Place = addresses.TryEnter(line.Client, Stopwatch.GetTimestamp(), out reason);
            }

            if (reason is not null)
            {
                Close(route, client, reason);
                return;
            }

            connection = await route.PoolOf(first?.Name)!.ConnectAsync( // (3) (4)
                portIndex, line.Client, client, hasSpoken: first is { Length: > 0 });
            line.Target = connection.Upstream?.Title ?? line.Target;
            reason = connection.Failure;
            if (reason is null)
            {
                line.Connected(connection.Server);
                taps = route.Settings.Taps.Count == 0 ? null
                    : new Conversation(route.Settings.Taps, route.Title, client, line.Client, connection.Socket, connection.Server,
                        isEcho: connection.Upstream!.Kind == AddressKind.Echo, route.Settings.Bridge.FinTimeout);
                reason = first is null ? null : await SendFirstAsync(route, client, line, first, connection, taps);
            }

            if (reason is null)
            {
                Bridge bridge = new(client, connection.Socket, connection.Upstream!.Kind, route.Settings.Bridge, // (5)
                    line.BytesUp, route.Rates, taps);
                _ = taps is null ? RelayAsync(route, connection, bridge, line)
                    : RelayTappedAsync(route, connection, bridge, line, taps);
                return;
            }

            connection.Socket?.Close(0);
            connection.Release();
            Close(route, client, reason);
        }
#pragma warning disable CA1031 // the last line of defence: one connection's surprise must not end the others
        catch (Exception e)
#pragma warning restore CA1031
        {
            connection.Socket?.Close(0);
            connection.Release();
            client.Close(0);
            reason = CloseReason.Unexpected(e);
        }
        finally
        {
            if (reason is not null)
            {
                End(route, isAdmitted, line, reason);
            }
        }
    }

    private static void Close(Route route, Socket client, CloseReason reason)
    {
        if (reason.IsOrderly && !route.Settings.Limits.IsResetting)
        {
            client.Dispose();
        }
        else
        {
            client.Close(0); // a reset: the client must not take this for an empty answer
        }
    }

    /// <summary>Steps (6) to (8), which is where a connection spends its life: of the steps before them nothing is kept.</summary>
    private async Task RelayAsync(Route route, Connection connection, Bridge bridge, ConnectionLine line)
    {
        bridge.Start();
        await bridge.Up;
        await bridge.Down;
        connection.Release();
        (line.BytesUp, line.BytesDown) = (bridge.BytesUp, bridge.BytesDown);
        End(route, isAdmitted: true, line, bridge.Reason!);
    }

    private async Task RelayTappedAsync(Route route, Connection connection, Bridge bridge, ConnectionLine line, Conversation taps)
    {
        await RelayAsync(route, connection, bridge, line);
        taps.End(bridge.Reason!.IsOrderly);
    }

    /// <summary>What the route wants to know before it chooses a server. Null when there is one.</summary>
    private static async ValueTask<CloseReason?> ReadFirstAsync(
        Route route, Socket client, ConnectionLine line, FirstBytes first)
    {
        PrereadSettings settings = route.Settings.Preread;
        bool isSender = settings.IsSender(line.Client);
        Refusal? refusal = !isSender && !route.NeedsName ? null
            : await first.ReadAsync(client, isSender, route.NeedsName, settings.Timeout);
        line.Client = first.Source ?? line.Client;
        if (first.Source is null && route.Settings.Connect.SendProxy != ProxyVersion.Off)
        {
            first.Destination = client.LocalEndPoint;
        }

        return refusal is not null ? new CloseReason(refusal.Code, refusal.Words)
            : route.PoolOf(first.Name) is null ? new CloseReason("PR", $"no server for {first.Whom}") : null;
    }

    /// <summary>A header to the server, and what was read. Null when it is sent.</summary>
    private static async ValueTask<CloseReason?> SendFirstAsync(
        Route route, Socket client, ConnectionLine line, FirstBytes first, Connection connection, Conversation? taps)
    {
        AddressKind kind = connection.Upstream!.Kind;
        ConnectSettings settings = route.Settings.Connect;
        long quota = route.Settings.Bridge.QuotaUp(kind);
        int length = quota == 0 ? first.Length : (int)Math.Min(first.Length, quota);
        if (taps?.Up is { } up)
        {
            up.Spoken = first.Copy(length);
            length = 0;
        }

        int header = connection.Socket is null || settings.SendProxy == ProxyVersion.Off ? 0
            : first.Head(settings.SendProxy, line.Client, first.Destination);
        Socket? target = kind == AddressKind.Echo ? client : connection.Socket;
        Refusal? refusal = header + length == 0 || target is null ? null
            : await first.SendAsync(target, header + length, settings.Timeout);
        line.BytesUp = refusal is null ? length : 0;
        return refusal is null ? null : target == client ? CloseReason.ClientReset
            : new CloseReason(refusal.Code, refusal.Words);
    }

    private void End(Route route, bool isAdmitted, ConnectionLine line, CloseReason reason)
    {
        if (isAdmitted)
        {
            route.Addresses?.Leave(line.Place);
            route.Leave();
        }

        if (reason.Error is { } error)
        {
            _log.Event(LogLevel.Error, "internal-error", error.ToString());
        }

        if (reason == CloseReason.OutOfDescriptors)
        {
            Exhaustion.Refused(_log); // one line an episode, not one a client
        }
        else if (!reason.IsRefusal || !_log.Has(LogLevel.Info) || route.Refusals.IsWorthLine(Environment.TickCount64))
        {
            line.Ended(reason.Code, reason.Words); // (8)
            _log.Ended(line);
        }

        _onceFailed = _settings.Once && reason != CloseReason.Done;
        Leave();
    }
}

// == 4  ACCEPTOR ====================================================================================================
// Binds a listen address, which may be several sockets, and accepts until it is disposed. An error of accept() is the
// client's (it left while it waited: go on) or the machine's (out of descriptors or memory: refuse those who wait,
// with the help of one descriptor kept in reserve, and go on). It is never a reason to stop listening.

internal sealed class Acceptor : IDisposable
{
    private const int Backlog = 4096; // the kernel takes its own limit when that is lower (net.core.somaxconn)
    private const int Burst = 64; // clients accepted without a wait
    private const int Pause = 50; // ms between two looks at the backlog while out of descriptors
    private const int FreePortTries = 20; // to find one port that is free on both loopback addresses

    private readonly Socket _socket; // owned; disposed by Dispose
    private readonly string? _path; // of a unix socket that we made; removed by Dispose
    private readonly int _portIndex;
    private readonly Action<Socket, int> _accepted;
    private readonly Log _log;
    private volatile bool _isDisposed;

    private Acceptor(Socket socket, string? path, int portIndex, bool isTwin, Log log, Action<Socket, int> accepted)
    {
        (_socket, _path, _portIndex, IsTwin, _log, _accepted) = (socket, path, portIndex, isTwin, log, accepted);
        Address = path is not null ? $"unix:{path}" : Text.Of(socket.LocalEndPoint);
    }

    internal string Address { get; }

    /// <summary>The second socket of one listen address: [::1] beside 127.0.0.1 with the same port.</summary>
    internal bool IsTwin { get; }

    public void Dispose()
    {
        _isDisposed = true;
        _socket.Dispose();
        if (_path is not null)
        {
            WholeFile.Remove(_path);
        }
    }

    /// <summary>Accepts until disposed; each client is handed over with its socket (rule 1).</summary>
    internal async Task RunAsync()
    {
        for (int burst = 0; !_isDisposed; burst++)
        {
            try
            {
                ValueTask<Socket> accepting = _socket.AcceptAsync(CancellationToken.None);
                burst = accepting.IsCompleted ? burst : 0;
                Socket client = await accepting;
                Exhaustion.Recovered(_log);
                _accepted(client, _portIndex);
            }
            catch (SocketException e) when (!_isDisposed && SocketErrors.IsExhausted(e.SocketErrorCode))
            {
                Exhaustion.RefuseWaiting(_socket, _log);
                await Task.Delay(Pause);
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                await Task.Delay(1); // this client has left before it was accepted; should it be more, no busy loop
            }

            if (burst == Burst)
            {
                burst = 0;
                await Task.Yield(); // others of this event loop have their turn
            }
        }
    }

    // ---- binding

    /// <summary>Adds one acceptor a socket to <paramref name="acceptors"/>.</summary>
    /// <exception cref="SocketException">an address cannot be bound</exception>
    /// <exception cref="IOException">a descriptor or a path is not what it should be</exception>
    internal static void Bind(
        ListenAddress address, Log log, Action<Socket, int> accepted, List<Acceptor> acceptors)
    {
        switch (address.Kind)
        {
            case AddressKind.Unix:
                Add(BindUnix(address.Host), address.Host, 0);
                break;
            case AddressKind.Descriptor:
                foreach (int descriptor in Descriptors.Inherited(address.Host))
                {
                    Add(Adopt(descriptor), null, 0);
                }

                break;
            case AddressKind.Loopback:
                for (int i = 0; i < address.PortCount; i++)
                {
                    (Socket first, Socket? second) = BindLoopback(address.PortAt(i));
                    Add(first, null, i);
                    if (second is not null)
                    {
                        Add(second, null, i, isTwin: true);
                    }
                }

                break;
            default:
                foreach (IPAddress host in Addresses(address.Host))
                {
                    for (int i = 0; i < address.PortCount; i++)
                    {
                        Add(BindTcp(host, address.PortAt(i)), null, i);
                    }
                }

                break;
        }

        void Add(Socket socket, string? path, int portIndex, bool isTwin = false)
        {
            Acceptor acceptor = new(socket, path, portIndex, isTwin, log, accepted);
            acceptors.Add(acceptor);
            if (socket.AddressFamily != AddressFamily.Unix)
            {
                SocketOptions.Relay(socket);
            }

            socket.Listen(Backlog);
        }

        static IPAddress[] Addresses(string host) =>
            host.Length == 0 ? [Socket.OSSupportsIPv6 ? IPAddress.IPv6Any : IPAddress.Any]
            : IPAddress.TryParse(host, out IPAddress? literal) ? [literal]
            : Dns.GetHostAddresses(host);
    }

    private static Socket BindTcp(IPAddress address, int port)
    {
        Socket socket = new(address.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            if (address.Equals(IPAddress.IPv6Any))
            {
                socket.DualMode = true;
            }

            socket.Bind(new IPEndPoint(address, port));
            return socket;
        }
        catch (SocketException)
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>A bare port is loopback, and a client that says localhost may mean either family.</summary>
    private static (Socket First, Socket? Second) BindLoopback(int port)
    {
        for (int i = 1; ; i++)
        {
            Socket first = BindTcp(IPAddress.Loopback, port);
            try
            {
                return (first, BindTcp(IPAddress.IPv6Loopback, ((IPEndPoint)first.LocalEndPoint!).Port));
            }
            catch (SocketException e) when (e.SocketErrorCode != SocketError.AddressAlreadyInUse)
            {
                return (first, null); // no IPv6 here
            }
            catch (SocketException) when (port == 0 && i < FreePortTries)
            {
                first.Dispose(); // the port that was free for IPv4 is taken for IPv6: ask for another
            }
            catch (SocketException)
            {
                first.Dispose();
                throw;
            }
        }
    }

    private static Socket BindUnix(string path)
    {
        UnixDomainSocketEndPoint endPoint = new(path);
        Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            RemoveStale(endPoint, path);
            socket.Bind(endPoint);
            return socket;
        }
        catch (SocketException)
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>A path that a process which is gone has left behind refuses connections; a live one is kept.</summary>
    private static void RemoveStale(UnixDomainSocketEndPoint endPoint, string path)
    {
        using Socket probe = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { Blocking = false };
        try
        {
            probe.Connect(endPoint);
        }
        catch (SocketException e) when (e.SocketErrorCode == SocketError.ConnectionRefused)
        {
            // what is no socket refuses too: it stays, and bind() says that the path is in use
            if (WholeFile.IsSocket(path))
            {
                WholeFile.Remove(path);
            }
        }
        catch (SocketException)
        {
            // it is not there, or not ours to judge: bind() says
        }
    }

    private static Socket Adopt(int descriptor)
    {
        try
        {
            Socket socket = new(new SafeSocketHandle(descriptor, ownsHandle: true));
            return socket.SocketType == SocketType.Stream ? socket
                : throw new IOException($"descriptor {descriptor} is not a stream socket");
        }
        catch (SocketException e)
        {
            throw new IOException($"descriptor {descriptor} is not an open socket: {Text.Reason(e)}");
        }
    }
}

/// <summary>The state "out of descriptors or memory" of the process: said once when it begins, once when it is over,
/// with a count of the clients that were refused in between.</summary>
internal static class Exhaustion
{
    private const int Over = 1000; // ms without a refusal

    private static readonly Lock Gate = new();
    private static Socket? _reserve = NewReserve();
    private static long _refused;
    private static long _last; // when the last client was refused
    private static volatile bool _lasts;

    internal static void Refused(Log log)
    {
        lock (Gate)
        {
            _refused++;
            Begin(log);
        }
    }

    /// <summary>Refuses all who wait at <paramref name="listener"/>: the reserve lends them a descriptor to be closed
    /// with, one after the other.</summary>
    internal static void RefuseWaiting(Socket listener, Log log)
    {
        lock (Gate)
        {
            Begin(log);
            _reserve?.Dispose();
            try
            {
                listener.Blocking = false;
                while (true)
                {
                    listener.Accept().Close(0);
                    _refused++;
                }
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                // nobody waits, or the descriptor was taken by another thread: the acceptor looks again later
            }
            finally
            {
                _reserve = NewReserve();
            }
        }
    }

    internal static void Recovered(Log log)
    {
        if (_lasts && Environment.TickCount64 - Volatile.Read(ref _last) > Over)
        {
            lock (Gate)
            {
                if (_lasts)
                {
                    _lasts = false;
                    log.Count(LogLevel.Warn, "recovered", "refused", _refused);
                    _refused = 0;
                }
            }
        }
    }

    private static void Begin(Log log)
    {
        Volatile.Write(ref _last, Environment.TickCount64);
        if (!_lasts)
        {
            _lasts = true;
            log.Event(LogLevel.Warn, "exhausted",
                $"out of descriptors or memory ({Descriptors.Limit} descriptors allowed): refusing clients");
        }
    }

    private static Socket? NewReserve()
    {
        try
        {
            return new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        }
        catch (SocketException)
        {
            return null; // taken meanwhile; the next look tries again
        }
    }
}

// == 5  ADMISSION ===================================================================================================
// Who may connect: how many at once and how many in a while, in all and from one address. Refusing is cheap, and said only so
// often: nobody may fill a log by being refused.

/// <summary>At most <paramref name="most"/> at once (0 = any number), here and in all that encloses it.</summary>
internal sealed class ConnectionLimit(int most, ConnectionLimit? enclosing)
{
    private int _count;

    internal bool TryEnter()
    {
        int count;
        do
        {
            count = Volatile.Read(ref _count);
            if (most != 0 && count >= most)
            {
                return false;
            }
        }
        while (Interlocked.CompareExchange(ref _count, count + 1, count) != count);
        if (enclosing is null || enclosing.TryEnter())
        {
            return true;
        }

        Interlocked.Decrement(ref _count);
        return false;
    }

    internal void Leave()
    {
        Interlocked.Decrement(ref _count);
        enclosing?.Leave();
    }
}

internal sealed class LimitSettings
{
    internal int MaxPerAddress { get; set; } // 0 = off
    internal int Ip6Prefix { get; set; } = 64; // bits
    internal ConnectRate? Rate { get; set; } // null = off, as below
    internal ConnectRate? RatePerAddress { get; set; }
    internal bool IsResetting { get; set; } // those who are refused
    internal bool HasAddresses => MaxPerAddress > 0 || RatePerAddress is not null;

    internal LimitSettings Clone() => (LimitSettings)MemberwiseClone();
}

/// <summary>A token bucket of connections, whose state is one number: when it is full again (the virtual scheduling
/// algorithm of ITU-T I.371). Times are Stopwatch's.</summary>
internal sealed class ConnectRate(long interval, int burst)
{
    private const int Most = 1_000_000;

    /// <summary>N/s [BURST] or N/m [BURST]; null for off.</summary>
    /// <exception cref="FormatException">it is no rate</exception>
    internal static ConnectRate? Parse(string text)
    {
        string[] words = text.Split(' ', StringSplitOptions.RemoveEmptyEntries);
        string unit = words.Length is 1 or 2 ? words[0][^Math.Min(2, words[0].Length)..] : "";
        if (unit is not ("/s" or "/m") && text is not ("off" or "0"))
        {
            throw new FormatException($"'{text}' is not a rate; write 10/s, 100/m, off, or '10/s 50' where 50 may come at once");
        }

        int count = text is "off" or "0" ? 0 : Units.ParseCount(words[0].Replace(unit, "", StringComparison.Ordinal), most: Most);
        int burst = words.Length == 1 ? count : Units.ParseCount(words[1], least: 1, most: Most);
        return count == 0 ? null : new ConnectRate(Stopwatch.Frequency * (unit == "/m" ? 60 : 1) / count, burst);
    }

    internal bool TryTake(ref long fullAt, long now)
    {
        long seen, next;
        do
        {
            seen = Volatile.Read(ref fullAt);
            next = Math.Max(seen, now) + interval;
        }
        while (next - now <= interval * burst && Interlocked.CompareExchange(ref fullAt, next, seen) != seen);
        return next - now <= interval * burst;
    }
}

/// <summary>The connections and the connect rate of each client address, in a table that never grows: an address has a
/// place in one set of eight, and takes that of one without connections whose rate has rested longest. Where all
/// eight have connections it is let in and not counted: to refuse it would let those who have many addresses shut out
/// the others. Nobody can aim at a set, because addresses are hashed with a secret.</summary>
internal sealed class AddressTable(LimitSettings settings, string route, Log log, int places = AddressTable.Places)
{
    internal const int Places = 1 << 17; // of 24 bytes
    private const int Ways = 8;

    private readonly Entry[] _entries = new Entry[places]; // under itself
    private readonly ulong _secret = (ulong)Random.Shared.NextInt64() | 1;
    private readonly ulong _otherSecret = (ulong)Random.Shared.NextInt64();
    private bool _isFull; // has been said

    /// <summary>The place, which is given to <see cref="Leave"/> in the end; -1 for one who is refused or not counted.</summary>
    internal int TryEnter(EndPoint? client, long now, out CloseReason? refusal)
    {
        refusal = null;
        if (client is not IPEndPoint { Address: var address })
        {
            return -1;
        }

        ulong tag = Tag(address);
        lock (_entries)
        {
            int place = Find(tag);
            if (place < 0)
            {
                if (!_isFull)
                {
                    log.Event(LogLevel.Warn, "addresses", "too many client addresses at once: some are not counted", route);
                }

                _isFull = true;
                return place;
            }

            ref Entry entry = ref _entries[place];
            refusal = settings.MaxPerAddress > 0 && entry.Active >= settings.MaxPerAddress ? CloseReason.AddressLimitReached
                : settings.RatePerAddress is { } rate && !rate.TryTake(ref entry.FullAt, now) ? CloseReason.AddressRateReached
                : null;
            entry.Active += refusal is null ? 1 : 0;
            return refusal is null ? place : -1;
        }
    }

    internal void Leave(int place)
    {
        if (place >= 0)
        {
            lock (_entries)
            {
                _entries[place].Active--;
            }
        }
    }

    private int Find(ulong tag)
    {
        int first = (int)(tag % (ulong)(places / Ways)) * Ways;
        int free = -1;
        for (int i = first; i < first + Ways; i++)
        {
            if (_entries[i].Tag == tag)
            {
                return i;
            }

            free = _entries[i].Active == 0 && (free < 0 || _entries[i].FullAt < _entries[free].FullAt) ? i : free;
        }

        if (free >= 0)
        {
            _entries[free] = new Entry { Tag = tag };
        }

        return free;
    }

    private ulong Tag(IPAddress address)
    {
        Span<byte> bytes = stackalloc byte[16];
        IPAddress wide = address.MapToIPv6();
        wide.TryWriteBytes(bytes, out _);
        int prefix = wide.IsIPv4MappedToIPv6 ? 128 : settings.Ip6Prefix;
        UInt128 key = BinaryPrimitives.ReadUInt128BigEndian(bytes) & (UInt128.MaxValue << (128 - prefix));
        ulong high = Math.BigMul((ulong)(key >> 64) ^ _secret, (ulong)key ^ _otherSecret, out ulong low);
        return high ^ low;
    }

    private struct Entry
    {
        internal ulong Tag; // of the address
        internal long FullAt; // of its rate
        internal int Active; // connections
    }
}

/// <summary>Bounds what refused clients cost the log: so many lines a second, then how many were left out.</summary>
internal sealed class Refusals(string route, Log log) : Watched
{
    private const int Most = 100; // lines a second
    private const int Second = 1000;

    private readonly Lock _gate = new();
    private long _since;
    private int _count; // since then

    internal bool IsWorthLine(long now)
    {
        lock (_gate)
        {
            Roll(now);
            _count++;
            if (_count == Most + 1)
            {
                Sweep.Add(this); // which says how many were left out, should nobody come any more
            }

            return _count <= Most;
        }
    }

    internal override bool Check(long now)
    {
        lock (_gate)
        {
            Roll(now);
            return true;
        }
    }

    internal override void Stop() => Check(long.MaxValue);

    private void Roll(long now)
    {
        if (now - _since >= Second)
        {
            if (_count > Most)
            {
                log.Event(LogLevel.Info, "refused", $"{Text.Count(_count - Most, "refused client")} left out", route);
                Sweep.Remove(this);
            }

            (_since, _count) = (now, 0);
        }
    }
}

// == 6  UPSTREAMS ===================================================================================================
// The servers of a route: which one comes next, which one instead when it does not answer, and who waits when all are full.
//
// A server is one upstream, or one of the addresses of its name. It is down after failed connects (until one client has
// tried it again) or after failed checks (until they go well), and back with a share that grows. Down is an opinion:
// where nothing else is left, servers that are down are tried.

/// <summary>One upstream as it was typed: its address and what follows it.</summary>
internal sealed class UpstreamSettings(UpstreamAddress address)
{
    private static readonly string[] Keys = ["weight", "backup", "max-connections", "slow-start", "name"];

    internal UpstreamAddress Address { get; } = address;
    internal int Weight { get; private set; } = 1; // 0 = drained: no new connections
    internal bool IsBackup { get; private set; }
    internal int MaxConnections { get; private set; } // 0 = off
    internal TimeSpan SlowStart { get; private set; } = TimeSpan.FromSeconds(10);
    internal string? Name { get; private set; }

    /// <summary>The TLS names of the clients that it serves; null = it is of the fallback group.</summary>
    internal string[]? ServerNames { get; set; }

    /// <summary>Whether a word looks like a setting, known or not: backup, or key=value.</summary>
    internal static bool IsOne(string word) => word == "backup"
        || (word.IndexOf('=', StringComparison.Ordinal) is int end and > 0
            && word[0] != '-' && Array.TrueForAll(word[..end].ToCharArray(), c => char.IsAsciiLetterLower(c) || c == '-'));

    /// <summary>ADDR [weight=N] [backup] [max-connections=N] [slow-start=TIME] [name=TEXT]</summary>
    /// <exception cref="FormatException">it is none</exception>
    internal static UpstreamSettings Parse(string text)
    {
        string[] words = text.Replace('\t', ' ').Split(' ', StringSplitOptions.RemoveEmptyEntries);
        int first = text.StartsWith("unix:", StringComparison.Ordinal) ? Array.FindIndex(words, IsOne) : Math.Min(1, words.Length);
        string address = first < 0 ? text : string.Join(' ', words, 0, first);
        UpstreamSettings settings = new(UpstreamAddress.Parse(address));
        for (int i = first; i >= 0 && i < words.Length; i++)
        {
            settings.Apply(words[i]);
        }

        return settings;
    }

    private void Apply(string word)
    {
        int equals = word.IndexOf('=', StringComparison.Ordinal);
        (string key, string value) = equals < 0 ? (word, "") : (word[..equals], word[(equals + 1)..]);
        int index = Text.ParseWord(key, "setting", Keys);
        if ((equals < 0) != (key == "backup"))
        {
            throw new FormatException(equals < 0 ? $"{key}: needs a value, as in {key}=5" : $"{key}: takes no value");
        }

        try
        {
            switch (index)
            {
                case 0: Weight = Units.ParseCount(value, most: 256); break; // as HAProxy's
                case 1: IsBackup = true; break;
                case 2: MaxConnections = Units.ParseCount(value); break;
                case 3: SlowStart = Units.ParseTime(value); break;
                default: Name = value.Length > 0 ? value : throw new FormatException("a name has at least one character"); break;
            }
        }
        catch (FormatException e)
        {
            throw new FormatException($"{key}: {e.Message}");
        }
    }
}

/// <summary>How a server is picked; the words of --balance, in its order.</summary>
internal enum Policy
{
    LeastConnections,
    RoundRobin,
    Random,
    Source,
    First,
}

internal sealed class PoolSettings
{
    internal Policy Policy { get; set; }
    internal int MaxFails { get; set; } // 0 = off, here and below
    internal TimeSpan FailTimeout { get; set; }
    internal TimeSpan Check { get; set; }
    internal int CheckRise { get; set; } = 1;
    internal int CheckFall { get; set; } = 1;
    internal byte[] CheckSend { get; set; } = [];
    internal byte[] CheckExpect { get; set; } = [];
    internal int Queue { get; set; }
    internal TimeSpan QueueTimeout { get; set; }

    internal PoolSettings Clone() => (PoolSettings)MemberwiseClone();
}

/// <summary>One upstream of a route, and where its addresses come from.</summary>
internal sealed class Upstream
{
    private readonly IPAddress[] _known;

    internal Upstream(UpstreamSettings settings, ConnectSettings connect, string route, Log log)
    {
        Config = settings;
        IPAddress[]? known = Kind == AddressKind.Tcp ? Resolver.Known(settings.Address.Host) : [];
        _known = known ?? [];
        Resolver = known is null ? new Resolver(settings.Address.Host, connect.Resolve, route, log) : null;
    }

    internal UpstreamSettings Config { get; }
    internal AddressKind Kind => Config.Address.Kind;
    internal string Title => Config.Name ?? Config.Address.Text;
    internal Resolver? Resolver { get; } // null where nothing needs to be looked up
    internal IPAddress[] Addresses => Resolver?.Addresses ?? _known;
}

/// <summary>One server: an upstream, or one of several addresses of an upstream's name.</summary>
internal sealed class Server(Balancer balancer, Upstream upstream, EndPoint[] targets, string title)
{
    internal int Active; // connections; changed by Interlocked

    internal Balancer Balancer { get; } = balancer;
    internal Upstream Upstream { get; } = upstream;
    internal EndPoint[] Targets { get; } = targets; // localhost has two, the built-in servers none
    internal string Title { get; set; } = title; // for the log, and for Maglev
    internal int Weight => Upstream.Config.Weight;
    internal bool HasRoom => Upstream.Config.MaxConnections is int most && (most == 0 || Volatile.Read(ref Active) < most);

    // the rest is the balancer's, under its gate; times are TickCount64
    internal int Turn { get; set; } // how much it is due
    internal int Fails { get; set; }
    internal long FailedAt { get; set; }
    internal long DownUntil { get; set; } // after failed connects
    internal bool IsCheckedDown { get; set; }
    internal int Contrary { get; set; } // checks in a row that say otherwise
    internal long BackSince { get; set; } // 0 = its start is over

    internal bool IsUp(long now) => !IsCheckedDown && now >= DownUntil;

    /// <summary>How much of its weight counts, in percent: all of it, or what a slow start allows.</summary>
    internal int Percent(long now)
    {
        double slow = Upstream.Config.SlowStart.TotalMilliseconds;
        if (BackSince != 0 && now - BackSince >= slow)
        {
            BackSince = 0;
        }

        return BackSince == 0 ? 100 : Math.Max(1, (int)((now - BackSince) * 100 / slow));
    }

    /// <summary>A connection has ended; whoever waits in line has the place.</summary>
    internal void Leave()
    {
        Interlocked.Decrement(ref Active);
        if (Balancer.Line is { Count: > 0 } line)
        {
            line.Serve();
        }
    }
}

/// <summary>The outcome of steps (3) and (4): a socket, or the failure. Releasing it gives the server's place back;
/// the socket then belongs to the bridge (rule 1).</summary>
internal readonly struct Connection(Upstream? upstream, Server? server, Dial? dial, CloseReason? failure)
{
    internal Upstream? Upstream { get; } = upstream; // null: it has not come to one of several
    internal Socket? Socket { get; } = dial?.Socket; // null for the built-in servers
    internal EndPoint? Server { get; } = dial?.Target;
    internal CloseReason? Failure { get; } = failure;

    internal void Release() => server?.Leave();
}

/// <summary>Picks servers and keeps their state. A pool of one server without a bound needs no lock; any other takes one
/// for the moment of a choice, because the order of turns is shared by all who choose.</summary>
internal sealed class Balancer(Upstream[] upstreams, int portIndex, PoolSettings settings, IPAddress? source, string route, Log log)
{
    private readonly Lock _gate = new();
    private readonly bool _isMarking = settings.MaxFails > 0 && settings.FailTimeout > TimeSpan.Zero;
    private readonly List<Server> _candidates = []; // of the choice that is being made
    private readonly List<Server> _known = []; // those, and whoever has left the name but still has connections
    private Server[] _servers = []; // replaced as a whole
    private IPAddress[][] _found = []; // what they were made from
    private ushort[] _table = []; // Maglev's, of places in _servers; empty = to be made
    private ulong _random = (ulong)Random.Shared.NextInt64() | 1;

    /// <summary>Where clients wait for room; null where there is no bound.</summary>
    internal WaitingLine? Line { get; } = !Array.Exists(upstreams, upstream => upstream.Config.MaxConnections > 0) ? null
        : new WaitingLine(settings.Queue, settings.QueueTimeout, CloseReason.ServersFull);

    internal Server[] Servers => Volatile.Read(ref _servers);

    // ---- the servers

    /// <summary>Takes over what look-ups have found. A server whose address stays keeps its state.</summary>
    internal void Update()
    {
        if (IsCurrent())
        {
            return;
        }

        lock (_gate)
        {
            IPAddress[][] found = Array.ConvertAll(upstreams, upstream => upstream.Addresses);
            List<Server> servers = [];
            _known.RemoveAll(server => Volatile.Read(ref server.Active) == 0 && Array.IndexOf(_servers, server) < 0);
            for (int i = 0; i < upstreams.Length; i++)
            {
                Add(servers, upstreams[i], found[i]);
            }

            _known.AddRange(servers.FindAll(server => !_known.Contains(server)));

            _table = [];
            Volatile.Write(ref _servers, [.. servers]);
            Volatile.Write(ref _found, found);
        }

        Line?.Serve();
    }

    private bool IsCurrent()
    {
        IPAddress[][] found = Volatile.Read(ref _found);
        for (int i = 0; i < found.Length; i++)
        {
            if (found[i] != upstreams[i].Addresses)
            {
                return false;
            }
        }

        return found.Length > 0;
    }

    private void Add(List<Server> servers, Upstream upstream, IPAddress[] addresses)
    {
        UpstreamAddress address = upstream.Config.Address;
        int port = address.PortAt(portIndex);
        string title = upstream.Config.Name ?? (upstream.Kind == AddressKind.Tcp ? $"{address.Host}:{port}" : address.Text);
        if (upstream.Resolver is null)
        {
            EndPoint[] targets = upstream.Kind == AddressKind.Unix ? [new UnixDomainSocketEndPoint(address.Host)]
                : Array.ConvertAll(addresses, EndPoint (ip) => new IPEndPoint(ip, port));
            Add(targets, addresses.Length == 1 && upstream.Config.Name is null ? targets[0].ToString()! : title);
            return;
        }

        bool isUsable = Array.Exists(addresses, ip => ip.AddressFamily == source?.AddressFamily);
        foreach (IPAddress ip in addresses)
        {
            if (!isUsable || ip.AddressFamily == source!.AddressFamily)
            {
                IPEndPoint target = new(ip, port);
                Add([target], addresses.Length == 1 ? title : $"{title}/{target}");
            }
        }

        void Add(EndPoint[] targets, string title)
        {
            Server server = _known.Find(server => server.Upstream == upstream
                && (targets.Length == 0 || server.Targets[0].Equals(targets[0]))) ?? new Server(this, upstream, targets, title);
            server.Title = title;
            if (!servers.Contains(server))
            {
                servers.Add(server);
            }
        }
    }

    // ---- the choice

    /// <summary>A place at the server that the policy picks of those not tried. Null when there is none, or no room.</summary>
    internal Server? TryTake(ulong client, List<Server>? tried, long now, out bool isFull)
    {
        isFull = false;
        if (Servers is [{ Upstream.Config: { Weight: > 0, MaxConnections: 0 } } lone] && tried is null)
        {
            Interlocked.Increment(ref lone.Active);
            return lone;
        }

        lock (_gate)
        {
            FindCandidates(tried, now, out isFull);
            Server? server = _candidates.Count > 0 ? Pick(client, now) : null;
            if (server is not null)
            {
                Interlocked.Increment(ref server.Active);
                if (IsMarked(server) && now >= server.DownUntil)
                {
                    server.DownUntil = now + (long)settings.FailTimeout.TotalMilliseconds; // this client tries it for all
                }
            }

            return server;
        }
    }

    /// <summary>The best there are: servers that are up; where those are down or full, backups (nginx's meaning); where none
    /// of them is up, full or not, those that are down.</summary>
    private void FindCandidates(List<Server>? tried, long now, out bool isFull)
    {
        const int Down = 2;
        int best = int.MaxValue;
        int bestFull = int.MaxValue;
        _candidates.Clear();
        foreach (Server server in _servers)
        {
            if (server.Weight == 0 || tried?.Contains(server) == true)
            {
                continue;
            }

            int rank = !server.IsUp(now) ? Down : server.Upstream.Config.IsBackup ? 1 : 0;
            if (!server.HasRoom)
            {
                bestFull = Math.Min(rank, bestFull);
            }
            else if (rank <= best)
            {
                if (rank < best)
                {
                    _candidates.Clear();
                }

                _candidates.Add(server);
                best = rank;
            }
        }

        isFull = bestFull < int.MaxValue;
        if (best == Down && bestFull < Down)
        {
            _candidates.Clear();
        }
    }

    private Server Pick(ulong client, long now)
    {
        switch (settings.Policy)
        {
            case Policy.LeastConnections:
                Server least = _candidates[0];
                _candidates.ForEach(other => least = IsLess(other, least, now) ? other : least);
                _candidates.RemoveAll(other => IsLess(least, other, now));
                return InTurn(now);
            case Policy.RoundRobin:
                return InTurn(now);
            case Policy.Random:
                (Server first, Server second) = (Draw(now), Draw(now));
                return IsLess(second, first, now) ? second : first;
            case Policy.Source:
                return OfSource(client, now);
            default:
                return _candidates[0];
        }
    }

    /// <summary>The shares that weight and slow start give, in hundredths of a weight.</summary>
    private static int Share(Server server, long now) => server.Weight * server.Percent(now);

    private static bool IsLess(Server a, Server b, long now) =>
        (long)Volatile.Read(ref a.Active) * Share(b, now) < (long)Volatile.Read(ref b.Active) * Share(a, now);

    /// <summary>nginx's smooth weighted order: each gains its share, the one that has most is next and pays for all.</summary>
    private Server InTurn(long now)
    {
        int total = 0;
        Server next = _candidates[0];
        foreach (Server server in _candidates)
        {
            int share = Share(server, now);
            total += share;
            server.Turn += share;
            next = server.Turn > next.Turn ? server : next;
        }

        next.Turn -= total;
        return next;
    }

    private Server Draw(long now)
    {
        int total = 0;
        _candidates.ForEach(server => total += Share(server, now));
        _random ^= _random << 13; // xorshift64 (Marsaglia)
        _random ^= _random >> 7;
        _random ^= _random << 17;
        int draw = (int)(_random % (ulong)total);
        return _candidates.Find(server => (draw -= Share(server, now)) < 0)!;
    }

    /// <summary>The client's server. While that one cannot take it, another draw decides, which is another one for each of its
    /// clients; in its slow start it gets back only so many of them.</summary>
    private Server OfSource(ulong client, long now)
    {
        _table = _table.Length > 0 ? _table : Maglev.Table(
            Array.ConvertAll(_servers, server => server.Title), Array.ConvertAll(_servers, server => server.Weight));
        int most = 0;
        _candidates.ForEach(server => most = Math.Max(most, server.Percent(now)));
        ulong draw = client;
        for (int i = 0; i < Maglev.Size; i++, draw = Maglev.Mix(draw + 1))
        {
            Server server = _servers[_table[draw % Maglev.Size]];
            if (_candidates.Contains(server) && (int)((client >> 32) % (ulong)most) < server.Percent(now))
            {
                return server;
            }
        }

        return _candidates[0];
    }

    /// <summary>The server and, in the order in which RFC 8305 has them tried beside it, those of the other addresses of its
    /// name. Null where there are none, or where a second attempt could be one too many for max-connections.</summary>
    internal Server[]? Racers(Server server, List<Server>? tried, long now)
    {
        if (server.Upstream.Resolver is not { Addresses.Length: > 1 } || server.Upstream.Config.MaxConnections > 0)
        {
            return null;
        }

        List<Server> others = [server];
        lock (_gate)
        {
            others.AddRange(Array.FindAll(_servers, other => other.Upstream == server.Upstream && other != server
                && (other.IsUp(now) || !server.IsUp(now)) && tried?.Contains(other) != true));
        }

        IPAddress[] order = Resolver.Interleave([.. others.ConvertAll(AddressOf)]);
        return Array.ConvertAll(order, address => others.Find(other => AddressOf(other).Equals(address))!);

        static IPAddress AddressOf(Server server) => ((IPEndPoint)server.Targets[0]).Address;
    }

    /// <summary>Another address of the same name, not tried yet, which costs none of the --retries.</summary>
    internal bool HasOther(Server server, List<Server> tried) =>
        Array.Exists(Servers, other => other.Upstream == server.Upstream && !tried.Contains(other));

    // ---- up and down

    /// <summary>A connect has ended, well or not.</summary>
    internal void Dialled(Server server, CloseReason? failure, long now)
    {
        if (failure is null ? server.Fails == 0 : !failure.IsWorthRetry || !_isMarking || Servers.Length == 1)
        {
            return;
        }

        bool isNews;
        lock (_gate)
        {
            bool wasMarked = IsMarked(server);
            if (failure is null ? wasMarked : !wasMarked && now - server.FailedAt > settings.FailTimeout.TotalMilliseconds)
            {
                server.Fails = 0;
            }

            if (failure is null)
            {
                server.DownUntil = 0;
                server.BackSince = wasMarked && Servers.Length > 1 ? now : server.BackSince;
            }
            else
            {
                server.Fails++;
                server.FailedAt = now;
                server.DownUntil = IsMarked(server) ? now + (long)settings.FailTimeout.TotalMilliseconds : 0;
            }

            isNews = wasMarked != IsMarked(server) && !server.IsCheckedDown;
        }

        if (isNews)
        {
            log.ServerState(route, server.Title, failure is null, failure is null ? "connected" : failure.Words);
        }
    }

    /// <summary>A check has ended, well or not.</summary>
    internal void Checked(Server server, string? failure, long now)
    {
        bool isDown = failure is not null;
        bool isNews;
        lock (_gate)
        {
            server.Contrary = isDown == server.IsCheckedDown ? 0 : server.Contrary + 1;
            if (server.Contrary < (isDown ? settings.CheckFall : settings.CheckRise) || server.Contrary == 0)
            {
                return;
            }

            server.Contrary = 0;
            server.IsCheckedDown = isDown;
            server.BackSince = isDown || Servers.Length == 1 ? 0 : now;
            isNews = !isDown || !IsMarked(server);
            if (!isDown)
            {
                (server.Fails, server.DownUntil) = (0, 0); // the failed connects before it were of the same illness
            }
        }

        if (isNews)
        {
            log.ServerState(route, server.Title, !isDown, isDown ? $"check: {failure}" : "check passed");
        }
    }

    private bool IsMarked(Server server) => _isMarking && server.Fails >= settings.MaxFails;
}

/// <summary>Consistent hashing (Eisenbud et al., Maglev, NSDI 2016, 3.4): each server goes through the table in an order of
/// its own and takes what is free, in turn with the others, as often as its weight says. What a table holds depends on the
/// titles and weights alone, and a server more or less leaves the places of the others almost as they were. That takes one
/// size for any number of servers.</summary>
internal static class Maglev
{
    internal const int Size = 65537; // prime, and a hundred times as many as servers

    /// <summary>The server of each place, as an index into <paramref name="titles"/>.</summary>
    internal static ushort[] Table(string[] titles, int[] weights)
    {
        const ushort Free = ushort.MaxValue;
        ushort[] table = new ushort[Size];
        Array.Fill(table, Free);
        int[] order = new int[titles.Length];
        uint[] next = new uint[titles.Length];
        uint[] step = new uint[titles.Length];
        int heaviest = 0;
        for (int i = 0; i < titles.Length; i++)
        {
            ulong hash = Hash(Encoding.UTF8.GetBytes(titles[i]));
            (order[i], next[i], step[i]) = (i, (uint)hash % Size, ((uint)(hash >> 32) % (Size - 1)) + 1);
            heaviest = Math.Max(heaviest, weights[i]);
        }

        Array.Sort(order, (a, b) => string.CompareOrdinal(titles[a], titles[b]));
        for (int round = 1, taken = 0; ; round++)
        {
            foreach (int i in order)
            {
                if ((long)round * weights[i] / heaviest == (round - 1L) * weights[i] / heaviest)
                {
                    continue; // a light one's turn does not come in each round
                }

                while (table[next[i]] != Free)
                {
                    next[i] = (next[i] + step[i]) % Size;
                }

                table[next[i]] = (ushort)i;
                if (++taken == Size)
                {
                    return table;
                }
            }
        }
    }

    /// <summary>FNV-1a: the same in every process.</summary>
    internal static ulong Hash(ReadOnlySpan<byte> bytes)
    {
        ulong hash = 14695981039346656037;
        foreach (byte b in bytes)
        {
            hash = (hash ^ b) * 1099511628211;
        }

        return Mix(hash);
    }

    /// <summary>MurmurHash3's last step: numbers that are near each other end up far apart.</summary>
    internal static ulong Mix(ulong hash)
    {
        hash = (hash ^ (hash >> 33)) * 0xff51afd7ed558ccd;
        hash = (hash ^ (hash >> 33)) * 0xc4ceb9fe1a85ec53;
        return hash ^ (hash >> 33);
    }

    /// <summary>Of a client: its address without the port, IPv4 however it is written; one for all of a unix socket.</summary>
    internal static ulong Hash(EndPoint? client)
    {
        Span<byte> bytes = stackalloc byte[16];
        int length = 0;
        if (client is IPEndPoint { Address: var address })
        {
            (address.IsIPv4MappedToIPv6 ? address.MapToIPv4() : address).TryWriteBytes(bytes, out length);
        }

        return Hash(bytes[..length]);
    }
}

/// <summary>Those who wait for room, in order. Whoever leaves a place calls <see cref="Serve"/>.</summary>
internal sealed class WaitingLine(int most, TimeSpan patience, CloseReason full)
{
    private readonly LinkedList<Waiter> _waiters = []; // under itself, as all below it
    private int _count;
    private int _picky; // of them

    internal TimeSpan Patience { get; } = patience;
    internal int Count => Volatile.Read(ref _count);

    /// <summary>Whoever comes now has to wait as well.</summary>
    internal bool IsHeldUp => Volatile.Read(ref _count) > Volatile.Read(ref _picky);

    /// <summary>Waits until <paramref name="tryEnter"/> has found room; it is called in order, and under the line's lock.
    /// Null then, else why not: a client that is reset, or ends without having sent anything, has left. One that
    /// <paramref name="hasSpoken"/> before may end and wait. One who <paramref name="isPicky"/> does not hold up those behind.</summary>
    internal Task<CloseReason?> EnterAsync(
        Func<bool> tryEnter, Socket? client, bool isPicky = false, bool hasSpoken = false)
    {
        Waiter waiter = new(this, tryEnter, client, isPicky, Environment.TickCount64) { HasSpoken = hasSpoken };
        Add(waiter);
        return waiter.Outcome.Task;
    }

    internal void Add(Waiter waiter)
    {
        lock (_waiters)
        {
            if (_count >= most)
            {
                waiter.Outcome.SetResult(full);
                return;
            }

            _waiters.AddLast(waiter.Node);
            _count++;
            _picky += waiter.IsPicky ? 1 : 0;
            Sweep.Add(waiter);
            Serve(); // room that came just before it stood in line
        }
    }

    /// <summary>Lets in who can be.</summary>
    internal void Serve()
    {
        lock (_waiters)
        {
            for (LinkedListNode<Waiter>? node = _waiters.First; node is not null;)
            {
                Waiter waiter = node.Value;
                node = node.Next;
                if (waiter.TryEnter())
                {
                    Remove(waiter, null);
                }
                else if (!waiter.IsPicky)
                {
                    return;
                }
            }
        }
    }

    private void Remove(Waiter waiter, CloseReason? reason)
    {
        lock (_waiters)
        {
            if (waiter.Node.List is not null)
            {
                _waiters.Remove(waiter.Node);
                _count--;
                _picky -= waiter.IsPicky ? 1 : 0;
                Sweep.Remove(waiter);
                waiter.Outcome.SetResult(reason);
            }
        }
    }

    internal sealed class Waiter : Watched
    {
        private readonly WaitingLine _line;
        private readonly Socket? _client;
        private readonly long _since;

        internal Waiter(WaitingLine line, Func<bool> tryEnter, Socket? client, bool isPicky, long now)
        {
            (_line, TryEnter, _client, IsPicky, _since) = (line, tryEnter, client, isPicky, now);
            Node = new LinkedListNode<Waiter>(this);
        }

        internal Func<bool> TryEnter { get; }
        internal bool IsPicky { get; }
        internal bool HasSpoken { get; init; }
        internal LinkedListNode<Waiter> Node { get; }
        internal TaskCompletionSource<CloseReason?> Outcome { get; } = new(TaskCreationOptions.RunContinuationsAsynchronously);

        internal override void Stop() => _line.Remove(this, CloseReason.StoppedConnecting);

        internal override bool Check(long now)
        {
            if (_line.Patience > TimeSpan.Zero && now - _since >= _line.Patience.TotalMilliseconds)
            {
                _line.Remove(this, CloseReason.QueueTimeout);
            }
            else if (_client is not null && (HasSpoken ? SocketOptions.HasFailed(_client) : SocketOptions.HasLeft(_client)))
            {
                _line.Remove(this, CloseReason.LeftQueue);
            }
            else
            {
                _line.Serve(); // a server may be back, which nobody says
            }

            return true;
        }
    }
}

/// <summary>The upstreams of a route: connects a client to one of their servers, and checks the servers.</summary>
internal sealed class UpstreamPool
{
    private const int WaitPause = 100; // ms between two attempts of --wait-for

    private readonly Upstream[] _upstreams;
    private readonly Resolver[] _resolvers; // of those upstreams that are names
    private readonly Balancer?[] _balancers; // one, or one a port where ranges are mapped; made when needed
    private readonly PoolSettings _settings;
    private readonly ConnectSettings _connect;
    private readonly string _route;
    private readonly Log _log;
    private volatile bool _isChecking;

    internal UpstreamPool(
        List<UpstreamSettings> upstreams, PoolSettings settings, ConnectSettings connect, string route, Log log)
    {
        (_settings, _connect, _route, _log) = (settings, connect, route, log);
        _upstreams = [.. upstreams.ConvertAll(upstream => new Upstream(upstream, connect, route, log))];
        _resolvers = Array.ConvertAll(Array.FindAll(_upstreams, u => u.Resolver is not null), u => u.Resolver!);
        int ports = 1;
        upstreams.ForEach(upstream => ports = Math.Max(ports, upstream.Address.PortCount));
        _balancers = new Balancer?[ports];
    }

    /// <summary>Connects to one server, or to the next when that fails: no more than --retries others.
    /// <paramref name="from"/> is the client's address as --balance source takes it; its socket <paramref name="client"/> is
    /// looked at only to see whether it has left.</summary>
    internal async ValueTask<Connection> ConnectAsync(
        int portIndex, EndPoint? from = null, Socket? client = null, bool hasSpoken = false)
    {
        long deadline = _connect.Deadline(); // of the first server, the look-up of its name included
        if (_resolvers.Length > 0 && Array.Exists(_resolvers, resolver => !resolver.IsFresh))
        {
            await Resolver.RefreshAsync(_resolvers, isKnown: _resolvers.Length < _upstreams.Length, deadline);
        }

        Balancer balancer = BalancerOf(portIndex);
        ulong key = _settings.Policy == Policy.Source ? Maglev.Hash(from) : 0;
        Upstream? only = _upstreams.Length == 1 ? _upstreams[0] : null;
        Connection last = new(only, null, null, balancer.Servers.Length == 0 ? CloseReason.NotResolved : CloseReason.NoServer);
        List<Server>? tried = null;
        int retries = _connect.Retries;
        while (true)
        {
            bool isFull = balancer.Line is { IsHeldUp: true } && tried is null;
            Server? server = isFull ? null : balancer.TryTake(key, tried, Environment.TickCount64, out isFull);
            if (isFull && server is null)
            {
                (server, CloseReason? refusal) = await WaitAsync(balancer, key, tried, client, hasSpoken);
                last = tried is null ? new Connection(only, null, null, refusal) : last;
                deadline = _connect.Deadline();
            }

            if (server is null)
            {
                return last;
            }

            Server[]? racers = balancer.Racers(server, tried, Environment.TickCount64);
            last = racers is null ? await DialAsync(server, deadline) : await RaceAsync(racers, deadline);
            if (last.Failure is not { IsWorthRetry: true })
            {
                return last;
            }

            (tried ??= []).AddRange(racers ?? [server]);
            if (!balancer.HasOther(server, tried) && retries-- == 0)
            {
                return last;
            }

            deadline = _connect.Deadline();
        }
    }

    /// <summary>--wait-for: null when a server has answered, else why none did.</summary>
    internal static async Task<string?> WaitForAsync(UpstreamAddress address, TimeSpan timeout)
    {
        long started = Environment.TickCount64;
        using Log silent = new(new LogSettings { Format = LogFormat.Off });
        ConnectSettings connect = new() { Timeout = TimeSpan.FromSeconds(1) };
        UpstreamPool pool = new([new UpstreamSettings(address)], new PoolSettings(), connect, "", silent);
        Sweep.Start([connect.Timeout]);
        while (true)
        {
            Connection connection = await pool.ConnectAsync(0);
            connection.Release();
            connection.Socket?.Dispose();
            if (connection.Failure is not { } failure)
            {
                return null;
            }

            if (timeout > TimeSpan.Zero && Environment.TickCount64 - started >= timeout.TotalMilliseconds)
            {
                return $"--wait-for: {address.Text} did not answer within {Units.Text(timeout)}: {failure.Words}";
            }

            await Task.Delay(WaitPause);
        }
    }

    private Balancer BalancerOf(int portIndex)
    {
        ref Balancer? place = ref _balancers[_balancers.Length == 1 ? 0 : portIndex];
        Balancer? balancer = Volatile.Read(ref place);
        if (balancer is null)
        {
            Balancer made = new(_upstreams, portIndex, _settings, _connect.Source, _route, _log);
            made.Update();
            balancer = Interlocked.CompareExchange(ref place, made, null) ?? made;
        }
        else if (_resolvers.Length > 0)
        {
            balancer.Update();
        }

        return balancer;
    }

    private static async Task<(Server? Server, CloseReason? Refusal)> WaitAsync(
        Balancer balancer, ulong key, List<Server>? tried, Socket? client, bool hasSpoken)
    {
        Server? server = null;
        CloseReason? refusal = await balancer.Line!.EnterAsync(
            () => (server = balancer.TryTake(key, tried, Environment.TickCount64, out _)) is not null,
            client, tried is not null, hasSpoken);
        return (server, refusal);
    }

    /// <summary>Connects to a server in which a place has been taken; it is given back when that fails.</summary>
    private async ValueTask<Connection> DialAsync(Server server, long deadline)
    {
        if (server.Targets.Length == 0)
        {
            return new Connection(server.Upstream, server, null, null);
        }

        try
        {
            (Dial? dial, CloseReason? failure) = await Dialer.DialAsync(server.Targets, _connect.Source, deadline);
            Dialled(server, failure);
            if (failure is null)
            {
                return new Connection(server.Upstream, server, dial, null);
            }

            server.Leave();
            return new Connection(server.Upstream, null, null, failure);
        }
        catch
        {
            server.Leave();
            throw;
        }
    }

    /// <summary>The same with others beside it, the first of which may win: then the place is taken there.</summary>
    private async ValueTask<Connection> RaceAsync(Server[] racers, long deadline)
    {
        Server first = racers[0];
        try
        {
            List<Dial> failed = [];
            (Dial? dial, CloseReason? failure) = await Dialer.DialAsync(
                Array.ConvertAll(racers, racer => racer.Targets[0]), _connect.Source, deadline, failed);
            foreach (Dial loser in failed)
            {
                Dialled(OwnerOf(loser), await loser.Outcome!);
            }

            Server? winner = dial is null ? null : OwnerOf(dial);
            if (winner is not null)
            {
                Dialled(winner, null);
                Interlocked.Increment(ref winner.Active);
            }

            return new Connection(first.Upstream, winner, dial, failure);
        }
        finally
        {
            first.Leave();
        }

        Server OwnerOf(Dial dial) => Array.Find(racers, racer => racer.Targets[0] == dial.Target)!;
    }

    private static void Dialled(Server server, CloseReason? failure)
    {
        server.Balancer.Dialled(server, failure, Environment.TickCount64);
        if (failure is not null)
        {
            server.Upstream.Resolver?.Doubt();
        }
    }

    // ---- active checks

    internal void StartChecks()
    {
        if (_settings.Check > TimeSpan.Zero)
        {
            _isChecking = true;
            _ = CheckAllAsync();
        }
    }

    internal void StopChecks() => _isChecking = false;

    /// <summary>Begins to check each server, now and whenever the look-up of a name has found new ones.</summary>
    private async Task CheckAllAsync()
    {
        List<Server> seen = [];
        do
        {
            await Resolver.RefreshAsync(_resolvers, isKnown: false, _connect.Deadline());
            List<Server> servers = [];
            for (int i = 0; i < _balancers.Length; i++)
            {
                servers.AddRange(BalancerOf(i).Servers);
            }

            servers.FindAll(server => server.Targets.Length > 0 && !seen.Contains(server))
                .ForEach(server => _ = CheckAsync(server));
            seen = servers;
            await Task.Delay(_settings.Check);
        }
        while (_isChecking && _resolvers.Length > 0);
    }

    private async Task CheckAsync(Server server)
    {
        int interval = (int)_settings.Check.TotalMilliseconds;
        await Task.Delay(Random.Shared.Next(interval));
        while (_isChecking && Array.IndexOf(server.Balancer.Servers, server) >= 0)
        {
            CloseReason? failure = await ProbeAsync(server);
            if (_isChecking && failure is not { IsWorthRetry: false }) // out of descriptors is no fault of the server's
            {
                server.Balancer.Checked(server, failure?.Words, Environment.TickCount64);
            }

            if (failure is not null)
            {
                server.Upstream.Resolver?.Doubt();
            }

            await Task.Delay(interval - (interval / 10) + Random.Shared.Next((interval / 5) + 1));
        }
    }

    private async Task<CloseReason?> ProbeAsync(Server server)
    {
        TimeSpan time = _connect.Timeout > TimeSpan.Zero && _connect.Timeout < _settings.Check ? _connect.Timeout : _settings.Check;
        long deadline = Environment.TickCount64 + (long)time.TotalMilliseconds;
        (Dial? dial, CloseReason? failure) = await Dialer.DialAsync(server.Targets, _connect.Source, deadline);
        if (dial is null)
        {
            return failure;
        }

        using Socket socket = dial.Socket;
        try
        {
            TimeSpan left = TimeSpan.FromMilliseconds(Math.Max(1, deadline - Environment.TickCount64));
            return await ConverseAsync(socket).WaitAsync(left) ? null : CloseReason.OfServer("not the expected answer");
        }
        catch (Exception e) when (e is SocketException or TimeoutException)
        {
            return CloseReason.OfServer(e is TimeoutException ? "no answer in time" : Text.Reason(e));
        }
    }

    /// <summary>Says what --check-send says, where the route sends headers behind one that speaks for nobody; whether the
    /// answer has what --check-expect wants.</summary>
    private async Task<bool> ConverseAsync(Socket socket)
    {
        const int Longest = 16 << 10; // bytes of an answer
        byte[] words = new byte[ProxyHeader.LongestWritten + _settings.CheckSend.Length];
        int header = _connect.SendProxy == ProxyVersion.Off ? 0 : ProxyHeader.Write(words, _connect.SendProxy, null, null);
        _settings.CheckSend.CopyTo(words, header);
        if (header + _settings.CheckSend.Length > 0)
        {
            await socket.SendAsync(words.AsMemory(0, header + _settings.CheckSend.Length), SocketFlags.None);
        }

        byte[] answer = new byte[_settings.CheckExpect.Length > 0 ? Longest : 0];
        int length = 0;
        for (int received = 1; received > 0 && length < answer.Length; length += received)
        {
            received = await socket.ReceiveAsync(answer.AsMemory(length), SocketFlags.None);
            if (answer.AsSpan(0, length + received).IndexOf(_settings.CheckExpect) >= 0)
            {
                return true;
            }
        }

        return answer.Length == 0;
    }
}

// == 7  CONNECT =====================================================================================================
// From a name to a connected socket: look-ups that nobody else waits for, and all addresses tried (RFC 8305).

internal sealed class ConnectSettings
{
    internal TimeSpan Timeout { get; set; } // for one server; zero = the operating system's
    internal int Retries { get; set; }
    internal TimeSpan Resolve { get; set; }
    internal IPAddress? Source { get; set; }
    internal ProxyVersion SendProxy { get; set; }

    /// <summary>When an attempt that begins now is given up (TickCount64).</summary>
    internal long Deadline() => Timeout > TimeSpan.Zero
        ? Environment.TickCount64 + (long)Timeout.TotalMilliseconds : long.MaxValue;

    internal ConnectSettings Clone() => (ConnectSettings)MemberwiseClone();
}

/// <summary>The addresses of one name, looked up when needed, by one look-up at a time, and kept for a while.</summary>
internal sealed class Resolver(string host, TimeSpan keep, string route, Log log)
{
    private const int Moment = 250; // ms: how long a connection waits for a look-up that it could do without
    private const int LeastPause = 1000; // ms from one look-up to the next, whatever fails

    private readonly Lock _gate = new();
    private volatile IPAddress[] _addresses = [];
    private Task? _lookup; // the one that runs; under _gate
    private long _askedAt;
    private long _answeredAt;
    private long _freshUntil = long.MinValue;

    /// <summary>The last known ones; the same array as before when they have not changed.</summary>
    internal IPAddress[] Addresses => _addresses;

    internal bool IsFresh => Environment.TickCount64 < Volatile.Read(ref _freshUntil);

    /// <summary>What needs no look-up, or null.</summary>
    internal static IPAddress[]? Known(string host) => IPAddress.TryParse(host, out IPAddress? literal) ? [literal]
        : host == "localhost" ? [IPAddress.Loopback, IPAddress.IPv6Loopback] // RFC 6761, 6.3
        : null;

    /// <summary>Looks up what is not fresh. Where addresses are known, or <paramref name="isKnown"/> says that others are,
    /// they serve when an answer takes longer than a moment.</summary>
    internal static async Task RefreshAsync(Resolver[] resolvers, bool isKnown, long deadline)
    {
        List<Task> lookups = [];
        long asked = 0;
        foreach (Resolver resolver in resolvers)
        {
            if (!resolver.IsFresh)
            {
                lookups.Add(resolver.LookUp());
                asked = Math.Max(asked, resolver._askedAt);
            }
        }

        if (lookups.Count > 0 && !IsKnown())
        {
            await Within(Task.WhenAny(lookups), deadline);
        }

        await Within(Task.WhenAll(lookups), IsKnown() ? asked + Moment : deadline); // whoever waits longer has another server

        static ConfiguredTaskAwaitable Within(Task task, long deadline)
        {
            long left = Math.Max(0, deadline - Environment.TickCount64);
            return task.WaitAsync(deadline == long.MaxValue ? Timeout.InfiniteTimeSpan : TimeSpan.FromMilliseconds(left))
                .ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
        }

        bool IsKnown() => isKnown || Array.Exists(resolvers, resolver => resolver._addresses.Length > 0);
    }

    /// <summary>The addresses did not answer: the name may have moved.</summary>
    internal void Doubt() => Volatile.Write(ref _freshUntil, Math.Min(_freshUntil, _answeredAt + LeastPause));

    private Task LookUp()
    {
        lock (_gate)
        {
            _askedAt = _lookup is null ? Environment.TickCount64 : _askedAt;
            return _lookup ??= LookUpAsync();
        }
    }

    private async Task LookUpAsync()
    {
        await Task.Yield(); // so that _lookup is set before it is cleared
        IPAddress[] found = _addresses;
        string? failure = null;
        try
        {
            // getaddrinfo blocks, and the pool is for what does not
            found = Interleave(await Task.Factory.StartNew(() => Dns.GetHostAddresses(host),
                CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default));
        }
#pragma warning disable CA1031 // whatever happened (no such name, no thread to be had), the next one asks again
        catch (Exception e)
#pragma warning restore CA1031
        {
            failure = Text.Reason(e);
        }

        // many name servers answer with the same addresses in another order each time
        bool isSame = found.Length == _addresses.Length && Array.TrueForAll(found, address => _addresses.Contains(address));
        Report(found, isSame, failure);
        lock (_gate)
        {
            _answeredAt = Environment.TickCount64;
            _addresses = isSame ? _addresses : found;
            _lookup = null;
            long time = failure is null ? (long)keep.TotalMilliseconds : Math.Min((long)keep.TotalMilliseconds, LeastPause);
            Volatile.Write(ref _freshUntil, _answeredAt + time);
        }
    }

    private void Report(IPAddress[] found, bool isSame, string? failure)
    {
        if (failure is not null)
        {
            string serves = found.Length > 0 ? "; its last known addresses serve" : "";
            log.Event(LogLevel.Warn, "resolve", $"{host}: {failure}{serves}", route);
        }
        else if (!isSame)
        {
            log.Event(_addresses.Length == 0 ? LogLevel.Debug : LogLevel.Info, "resolve",
                $"{host} is {string.Join(' ', (object[])found)}", route);
        }
    }

    /// <summary>RFC 8305, 4: the families in turn, beginning with that of the resolver's first choice (RFC 6724).</summary>
    internal static IPAddress[] Interleave(IPAddress[] addresses)
    {
        List<IPAddress> first = [.. addresses];
        List<IPAddress> second = first.FindAll(address => address.AddressFamily != addresses[0].AddressFamily);
        first.RemoveAll(second.Contains);
        for (int i = 0; i < second.Count; i++)
        {
            first.Insert(Math.Min((2 * i) + 1, first.Count), second[i]);
        }

        return [.. first];
    }
}

/// <summary>One attempt to connect to one address. Its socket is the caller's when it succeeds, else closed.</summary>
internal sealed class Dial : Watched
{
    private readonly long _deadline;
    private CloseReason? _ended; // by the sweep, or Done: whoever is first

    private Dial(Socket socket, EndPoint target, long deadline) => (Socket, Target, _deadline) = (socket, target, deadline);

    internal Socket Socket { get; } // owned until it has succeeded
    internal EndPoint Target { get; }
    internal Task<CloseReason?>? Outcome { get; private set; }

    /// <exception cref="SocketException">no socket: out of descriptors, or the source address is not ours</exception>
    internal static Dial Start(EndPoint target, IPAddress? source, long deadline)
    {
        bool isUnix = target.AddressFamily == AddressFamily.Unix;
        Socket socket = new(target.AddressFamily, SocketType.Stream, isUnix ? ProtocolType.Unspecified : ProtocolType.Tcp);
        try
        {
            if (!isUnix)
            {
                SocketOptions.Relay(socket);
                SocketOptions.BindSource(socket, source);
            }

            return new Dial(socket, target, deadline);
        }
        catch (SocketException)
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>Null when connected, else why not.</summary>
    internal Task<CloseReason?> RunAsync() => Outcome = ConnectAsync();

    private async Task<CloseReason?> ConnectAsync()
    {
        try
        {
            ValueTask connecting = Socket.ConnectAsync(Target, CancellationToken.None);
            if (!connecting.IsCompleted)
            {
                Sweep.Add(this);
            }

            await connecting;
            if (IsLoop())
            {
                throw new SocketException((int)SocketError.ConnectionRefused);
            }

            return Interlocked.CompareExchange(ref _ended, CloseReason.Done, null); // or the sweep was first
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            Socket.Dispose();
            return _ended ?? CloseReason.OfConnect(e);
        }
        finally
        {
            Sweep.Remove(this);
        }
    }

    /// <summary>Where nobody listens, a connect to an own port that the system picks for its near end as well succeeds:
    /// TCP's simultaneous open with itself.</summary>
    private bool IsLoop() => Target is IPEndPoint ip && IPAddress.IsLoopback(ip.Address) && Target.Equals(Socket.LocalEndPoint);

    internal override bool Check(long now)
    {
        if (now >= _deadline)
        {
            End(CloseReason.ConnectTimeout);
        }

        return true;
    }

    internal override void Stop() => End(CloseReason.StoppedConnecting);

    internal void End(CloseReason reason)
    {
        if (Interlocked.CompareExchange(ref _ended, reason, null) is null)
        {
            Socket.Close(0); // makes the pending connect end
        }
    }
}

internal static class Dialer
{
    private const int AttemptDelay = 250; // ms: RFC 8305, 5, Connection Attempt Delay

    /// <summary>Connects to the first of <paramref name="targets"/> that answers; the one deadline is for all. Those that
    /// did not are added to <paramref name="failed"/>, those that were not waited for are not.</summary>
    internal static async ValueTask<(Dial? Dial, CloseReason? Failure)> DialAsync(
        EndPoint[] targets, IPAddress? source, long deadline, List<Dial>? failed = null)
    {
        CloseReason noTarget = targets.Length == 0 ? CloseReason.NotResolved : CloseReason.WrongFamily;
        if (source is not null)
        {
            targets = Array.FindAll(targets, target => target.AddressFamily == source.AddressFamily
                || target.AddressFamily == AddressFamily.Unix);
        }

        if (targets.Length != 1)
        {
            return targets.Length == 0 ? (null, noTarget) : await RaceAsync(targets, source, deadline, failed ?? []);
        }

        (Dial? dial, CloseReason? failure) = Start(targets[0], source, deadline);
        failure ??= await dial!.RunAsync();
        return failure is null ? (dial, null) : (null, failure);
    }

    private static (Dial? Dial, CloseReason? Failure) Start(EndPoint target, IPAddress? source, long deadline)
    {
        try
        {
            return (Dial.Start(target, source, deadline), null);
        }
        catch (SocketException e)
        {
            return (null, CloseReason.OfConnect(e));
        }
    }

    /// <summary>RFC 8305: the next address is tried when the last one failed or has not answered for a while; the
    /// first to connect wins and the others are closed.</summary>
    private static async Task<(Dial? Dial, CloseReason? Failure)> RaceAsync(
        EndPoint[] targets, IPAddress? source, long deadline, List<Dial> failed)
    {
        List<Dial> running = [];
        CloseReason? failure = null;
        for (int next = 0; next < targets.Length || running.Count > 0;)
        {
            if (next < targets.Length)
            {
                (Dial? dial, failure) = Start(targets[next++], source, deadline);
                if (dial is not null)
                {
                    _ = dial.RunAsync();
                    running.Add(dial);
                }
            }

            await AnyEndAsync(running, next < targets.Length);
            for (int i = running.Count - 1; i >= 0; i--)
            {
                Dial dial = running[i];
                if (dial.Outcome!.IsCompleted)
                {
                    failure = await dial.Outcome;
                    running.RemoveAt(i);
                    if (failure is null)
                    {
                        running.ForEach(loser => loser.End(CloseReason.Outrun));
                        failed.AddRange(running.GetRange(0, i)); // those before it have had their delay, and kept silent
                        return (dial, null);
                    }

                    failed.Add(dial);
                }
            }
        }

        return (null, failure);
    }

    private static async Task AnyEndAsync(List<Dial> running, bool hasNext)
    {
        if (running.Count > 0 && !running[^1].Outcome!.IsCompleted)
        {
            Task end = Task.WhenAny(running.ConvertAll(Task (dial) => dial.Outcome!));
            await (hasNext ? end.WaitAsync(TimeSpan.FromMilliseconds(AttemptDelay)) : end)
                .ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing); // the time-out is no error: the next starts
        }
    }
}

// == 8  BRIDGE ======================================================================================================
// Owns the two sockets of a connection and the two pumps between them, from the moment both exist to the end:
//
//     Open ------ one side sends FIN (Finished) ------> HalfOpen ------ the other too (Finished) ------> Closed
//       |                                                  |                                                ^
//       +----- RST, an error, a timeout, the end of the process (Abort): both sides are reset --------------+
//
// A quota (--max-bytes-up, -down) ends its direction as a FIN would; the other may still answer, but not keep silent.

internal sealed class BridgeSettings
{
    internal TimeSpan IdleTimeout { get; set; } // zero = off, here and below
    internal TimeSpan FinTimeout { get; set; }
    internal TimeSpan MaxLifetime { get; set; }
    internal TimeSpan LifetimeJitter { get; set; }
    internal TimeSpan Keepalive { get; set; }
    internal long MaxBytesUp { get; set; }
    internal long MaxBytesDown { get; set; }
    internal long RateUp { get; set; } // bytes a second, as below
    internal long RateDown { get; set; }
    internal long RateTotalUp { get; set; } // of all connections together, as below
    internal long RateTotalDown { get; set; }
    internal bool HasRates => (RateUp | RateDown | RateTotalUp | RateTotalDown) != 0;
    internal int BufferSize { get; set; }
    internal bool IsSplicing { get; set; }

    /// <summary>How long the answer to the last bytes of a quota may keep silent.</summary>
    internal TimeSpan QuotaGrace =>
        FinTimeout > TimeSpan.Zero && FinTimeout < TimeSpan.FromSeconds(1) ? FinTimeout : TimeSpan.FromSeconds(1);

    /// <summary>The quota of the pump from the client. What echo gets it also gives, so the lesser of two holds.</summary>
    internal long QuotaUp(AddressKind kind) => IsDownFirst(kind) ? MaxBytesDown : MaxBytesUp;

    internal bool IsDownFirst(AddressKind kind) =>
        kind == AddressKind.Echo && MaxBytesDown > 0 && (MaxBytesUp == 0 || MaxBytesDown < MaxBytesUp);

    internal BridgeSettings Clone() => (BridgeSettings)MemberwiseClone();
}

/// <summary>The rates of a route at run time: buckets of its own, which its connections share.</summary>
internal sealed class Rates(BridgeSettings settings)
{
    private readonly ByteRate[] _up = ByteRate.Of(settings.RateTotalUp);
    private readonly ByteRate[] _down = ByteRate.Of(settings.RateTotalDown);

    /// <summary>For the pump from the client of a new connection. What echo gets it also gives.</summary>
    internal Throttle? Up(Socket client, bool isEcho) => Throttle.Of(
        client, [.. ByteRate.Of(settings.RateUp), .. _up, .. isEcho ? ByteRate.Of(settings.RateDown) : [], .. isEcho ? _down : []]);

    internal Throttle? Down(Socket upstream) => Throttle.Of(upstream, [.. ByteRate.Of(settings.RateDown), .. _down]);
}

/// <summary>Why a connection ended: HAProxy's two letters (its manual, 8.5: who ended it, and in which phase) and
/// words. An orderly end closes with FIN, any other resets both sides.</summary>
internal sealed class CloseReason(
    string code, string words, bool isOrderly = false, bool isWorthRetry = false, Exception? error = null)
{
    internal static readonly CloseReason Done = new("--", "done", isOrderly: true);
    internal static readonly CloseReason ClientReset = new("CD", "client reset");
    internal static readonly CloseReason UpstreamReset = new("SD", "upstream reset");
    internal static readonly CloseReason IdleTimeout = new("cD", "idle timeout");
    internal static readonly CloseReason ClientFinTimeout = new("cD", "fin timeout");
    internal static readonly CloseReason UpstreamFinTimeout = new("sD", "fin timeout");
    internal static readonly CloseReason MaxLifetime = new("PD", "max lifetime");
    internal static readonly CloseReason QuotaUp = new("PD", "byte quota up", isOrderly: true);
    internal static readonly CloseReason QuotaDown = new("PD", "byte quota down", isOrderly: true);
    internal static readonly CloseReason Shutdown = new("KD", "shutdown");
    internal static readonly CloseReason StoppedConnecting = new("KC", "shutdown");
    internal static readonly CloseReason LimitReached = new("PC", "connection limit", isOrderly: true);
    internal static readonly CloseReason RateReached = new("PC", "connect rate", isOrderly: true);
    internal static readonly CloseReason AddressLimitReached = new("PC", "connection limit of the address", isOrderly: true);
    internal static readonly CloseReason AddressRateReached = new("PC", "connect rate of the address", isOrderly: true);
    internal static readonly CloseReason ServersFull = new("PQ", "servers full", isOrderly: true);
    internal static readonly CloseReason QueueTimeout = new("sQ", "queue timeout", isOrderly: true);
    internal static readonly CloseReason LeftQueue = new("CQ", "client left");
    internal static readonly CloseReason NoServer = new("SC", "no server");
    internal static readonly CloseReason OutOfDescriptors = new("RC", "out of descriptors");
    internal static readonly CloseReason NotResolved = new("SC", "name not resolved", isWorthRetry: true);
    internal static readonly CloseReason WrongFamily = new("SC", "no address of the source's family", isWorthRetry: true);
    internal static readonly CloseReason Outrun = new("sC", "no answer while another address gave one", isWorthRetry: true);
    internal static readonly CloseReason ConnectTimeout = new("sC", "connect timeout", isWorthRetry: true);

    internal string Code { get; } = code;
    internal string Words { get; } = words;
    internal bool IsOrderly { get; } = isOrderly;

    /// <summary>The proxy would not have this client: over a limit, against a rule.</summary>
    internal bool IsRefusal => Code is "PC" or "PR" or "PQ";

    /// <summary>The failure is this server's, so another may do better.</summary>
    internal bool IsWorthRetry { get; } = isWorthRetry;

    /// <summary>What nobody expected: a defect of ours.</summary>
    internal Exception? Error { get; } = error;

    internal static CloseReason Unexpected(Exception e) => new("IC", "internal error", error: e);

    internal static CloseReason OfConnect(Exception e) => e is not SocketException error ? Unexpected(e)
        : SocketErrors.IsExhausted(error.SocketErrorCode) ? OutOfDescriptors
        : error.SocketErrorCode == SocketError.TimedOut ? ConnectTimeout
        : OfServer(Text.Reason(error));

    /// <summary>What is the server's fault, in so many words.</summary>
    internal static CloseReason OfServer(string words) => new("SC", words, isWorthRetry: true);
}

internal sealed class Bridge : PumpOwner
{
    private const int ProbeAge = 5000; // ms: a younger connection is not worth the system calls of keep-alive
    private const int StalledFor = 1000; // ms without progress before a socket that nobody reads is looked at

    private readonly Socket _client; // owned; closed by Close
    private readonly Socket? _upstream; // owned; closed by Close; null for the built-in servers
    private readonly BridgeSettings _settings;
    private readonly Pump _up;
    private readonly Pump? _down; // null for the built-in servers: one pump is all they are
    private readonly bool _isEcho; // what comes from the client counts both ways
    private readonly CloseReason _upQuota;
    private readonly long _startedAt = Environment.TickCount64;
    private CloseReason? _reason; // rule 4
    private int _references; // rule 3

    // the sweep's own: nobody else touches them
    private long _progress;
    private long _quietSince = Environment.TickCount64;
    private long _unsent = -1; // bytes in the kernel's send queues when half of the limit had passed
    private bool _isProbed;

    /// <summary>So many bytes of the client have already <paramref name="passed"/>.</summary>
    internal Bridge(
        Socket client, Socket? upstream, AddressKind kind, BridgeSettings settings, long passed = 0, Rates? rates = null,
        Conversation? taps = null)
    {
        (_client, _upstream, _settings, _isEcho) = (client, upstream, settings, kind == AddressKind.Echo);
        _upQuota = settings.IsDownFirst(kind) ? CloseReason.QuotaDown : CloseReason.QuotaUp;
        _up = new Pump(client, _isEcho ? client : upstream, settings.BufferSize, settings.IsSplicing,
            settings.QuotaUp(kind), passed, rates?.Up(client, _isEcho), taps?.Up);
        _down = upstream is null ? null
            : new Pump(upstream, client, settings.BufferSize, settings.IsSplicing, settings.MaxBytesDown, 0,
                rates?.Down(upstream), taps?.Down);
        _references = _down is null ? 1 : 2;
        client.Blocking = false;
        if (upstream is not null)
        {
            upstream.Blocking = false;
        }

        if (!OperatingSystem.IsLinux() && client.AddressFamily != AddressFamily.Unix)
        {
            SocketOptions.Relay(client); // on Linux an accepted socket has it from its listener
        }
    }

    internal long BytesUp => _up.Bytes;
    internal long BytesDown => _down is not null ? _down.Bytes : _isEcho ? _up.Bytes : 0;

    /// <summary>The pumps. When both have ended, the sockets are closed and the reason stands.</summary>
    internal Task Up { get; private set; } = Task.CompletedTask;
    internal Task Down { get; private set; } = Task.CompletedTask;
    internal CloseReason? Reason => _reason;

    internal void Start()
    {
        Sweep.Add(this);
        Up = _up.RunAsync(this);
        if (_down is not null)
        {
            Down = _down.RunAsync(this);
        }
    }

    /// <summary>(7) Passes FIN on. After an end that was not orderly there is none to pass: the last release resets.</summary>
    internal override void Finished(Pump pump, PumpEnd end)
    {
        if (end == PumpEnd.Quota)
        {
            Interlocked.CompareExchange(ref _reason, pump == _up ? _upQuota : CloseReason.QuotaDown, null);
        }

        // the second of two clean ends needs no system call of its own: closing sends the FIN
        bool isLast = end == PumpEnd.Source && _reason is null && Volatile.Read(ref _references) == 1;
        if (!isLast && (_reason is null || _reason.IsOrderly))
        {
            try
            {
                pump.Target?.Shutdown(SocketShutdown.Send);
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                // the target has gone; the other pump finds out why
            }
        }
    }

    /// <summary>An error has a culprit: the source when it was received from, else the target.</summary>
    internal override void Failed(Pump pump, Exception error)
    {
        if (error is not (SocketException or ObjectDisposedException))
        {
            Abort(error is TapException tap ? new CloseReason(tap.Code, tap.Message, tap.IsOrderly) : CloseReason.Unexpected(error)); // the other pump must not go on alone
            return;
        }

        bool isClient = (pump.IsSending ? pump.Target : pump.Source) == _client;
        CloseReason reason = isClient ? CloseReason.ClientReset : CloseReason.UpstreamReset;
        if (pump.IsSending)
        {
            // what the target had sent before it went away may still wait to be received: its pump ends by itself
            Interlocked.CompareExchange(ref _reason, reason, null);
        }
        else
        {
            Abort(reason);
        }
    }

    internal override void Release()
    {
        if (Interlocked.Decrement(ref _references) == 0)
        {
            Abort(CloseReason.Done);
            Sweep.Remove(this);
        }
    }

    /// <summary>Closes both sockets for the first reason that was given; whatever pends on them ends.</summary>
    private void Abort(CloseReason reason)
    {
        CloseReason first = Interlocked.CompareExchange(ref _reason, reason, null) ?? reason;
        Close(_client, first);
        Close(_upstream, first);
        _up.Cancel();
        _down?.Cancel();

        static void Close(Socket? socket, CloseReason reason)
        {
            if (reason.IsOrderly)
            {
                socket?.Dispose();
            }
            else
            {
                socket?.Close(0); // linger zero: a reset
            }
        }
    }

    // ---- timeouts: called by the sweep, one to forty times a second

    internal override void Stop() => Abort(CloseReason.Shutdown);

    internal override bool Check(long now)
    {
        if (_settings.MaxLifetime > TimeSpan.Zero && now - _startedAt >= _settings.MaxLifetime.TotalMilliseconds + Jitter())
        {
            Abort(CloseReason.MaxLifetime);
            return true;
        }

        try
        {
            Probe(now);
            return CheckProgress(now);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            return true; // it has just been closed
        }
    }

    /// <summary>Always the same for this bridge: the runtime's hash of it is a random number of 26 bits, which costs no field.</summary>
    private double Jitter() => RuntimeHelpers.GetHashCode(this) / (double)(1 << 26) * _settings.LifetimeJitter.TotalMilliseconds;

    private void Probe(long now)
    {
        if (!_isProbed && now - _startedAt >= ProbeAge)
        {
            _isProbed = true;
            SocketOptions.Keepalive(_client, _settings.Keepalive);
            SocketOptions.Keepalive(_upstream, _settings.Keepalive);
        }
    }

    private bool CheckProgress(long now)
    {
        long progress = ((_up.Progress + (_down?.Progress ?? 0)) << 2) + Volatile.Read(ref _references); // a FIN is progress as well
        if (progress != _progress)
        {
            (_progress, _quietSince, _unsent) = (progress, now, -1);
            return true;
        }

        long quiet = now - _quietSince;
        if (quiet >= StalledFor)
        {
            CheckStalled(_up, CloseReason.ClientReset);
            CheckStalled(_down, CloseReason.UpstreamReset);
        }

        (TimeSpan limit, CloseReason reason) = Limit();
        if (limit == TimeSpan.Zero || quiet < limit.TotalMilliseconds / 2)
        {
            return false;
        }

        // a slow reader takes long for what one send has left in the kernel's queue: that is progress too
        long unsent = SocketOptions.Unsent(_client) + SocketOptions.Unsent(_upstream);
        if (_unsent < 0)
        {
            _unsent = unsent;
        }
        else if (unsent != _unsent)
        {
            (_quietSince, _unsent) = (now, -1);
        }
        else if (quiet >= limit.TotalMilliseconds)
        {
            Abort(reason);
        }

        return false;
    }

    private (TimeSpan Limit, CloseReason Reason) Limit() =>
        _reason is not null ? (_settings.QuotaGrace, _reason)
        : _up.IsFinished ? (_settings.FinTimeout, CloseReason.UpstreamFinTimeout)
        : _down is { IsFinished: true } ? (_settings.FinTimeout, CloseReason.ClientFinTimeout)
        : (_settings.IdleTimeout, CloseReason.IdleTimeout);

    /// <summary>From a source whose pump cannot send, or has finished, nobody receives: a reset would go unnoticed.</summary>
    private void CheckStalled(Pump? pump, CloseReason reason)
    {
        if (pump is not null && (pump.IsSending || pump.IsFinished) && SocketOptions.HasFailed(pump.Source))
        {
            Abort(reason);
        }
    }
}

// == 9  PUMP ========================================================================================================
// One direction of a bridge: receive, send, again. (6)
//
// A pump that waits for data holds no buffer, and yet no system call is spent on finding out whether there is data:
// the memory given to ReceiveAsync is a ReceiveBuffer, which has an array only while somebody receives into it. Each
// message costs a recv that finds nothing (the runtime's own first attempt), the recv that finds it, and a send.
// The send is the synchronous one of a socket that does not block; SendAsync is for what it leaves.

internal enum PumpEnd
{
    NotYet,
    Source, // it has sent all it will
    Quota,
    Tap, // which lets nothing more through; the pump goes on, and what it still receives is dropped
}

/// <summary>Owns the sockets of its pumps. Each pump holds a reference to it, and gives it back when it has ended.</summary>
internal abstract class PumpOwner : Watched
{
    /// <summary>No more bytes will come this way.</summary>
    internal abstract void Finished(Pump pump, PumpEnd end);

    internal abstract void Failed(Pump pump, Exception error);

    internal abstract void Release();
}

internal sealed class Pump(
    Socket source, Socket? target, int bufferSize, bool isSplicing, long quota, long passed = 0, Throttle? throttle = null,
    TapLine? taps = null)
{
    private const int StreamAfter = 4; // full buffers in a row make a stream
    private const int Message = 16 << 10; // bytes; what is larger may well fill the target, and then a first try costs one call more
    private const int StreamFactor = 4; // buffers that a stream moves at once: 256k was best of 64k to 1m, copied or spliced
    private const int Burst = 1 << 20; // bytes without a wait, after which others of this event loop have their turn

    private readonly ReceiveBuffer _buffer = new();
    private long _left = quota == 0 ? long.MaxValue : quota - passed;
    private int _burst;

    internal Socket Source { get; } = source;
    internal Socket? Target { get; } = target; // null: what comes is dropped
    internal long Bytes { get; private set; } = passed;

    /// <summary>It waits for the target, or for its rate, not for the source.</summary>
    internal bool IsSending { get; private set; }
    internal bool IsFinished { get; private set; }

    /// <summary>Grows with each byte that moves.</summary>
    internal long Progress => Bytes + (taps?.Delivered ?? 0);

    /// <summary>The sockets are closed; what its taps wait for besides is not worth waiting for.</summary>
    internal void Cancel() => taps?.Cancel();

    /// <summary>Copies until the end; as long as it is a stream, the kernel does it. Never throws: its owner is told, by
    /// a call rather than by a task of its own that would wait as long as the pump (200 bytes a connection).</summary>
    internal async Task RunAsync(PumpOwner owner)
    {
        try
        {
            PumpEnd end = taps is not null ? await OpenAsync(taps, owner) : _left == 0 ? PumpEnd.Quota : PumpEnd.NotYet;

            int full = 0; // buffers in a row
            while (end == PumpEnd.NotYet)
            {
                int most = full < StreamAfter ? bufferSize : StreamFactor * bufferSize;
                int length = await (throttle is null ? ReceiveAsync(most) : ReceiveThrottledAsync(throttle));
                if (taps is not null)
                {
                    IsSending = true;
                    await taps.First.WriteAsync(_buffer.Received(length));
                    IsSending = false;
                }
                else if (length > 0 && Target is not null)
                {
                    IsSending = true;
                    int sent = length <= Message ? Send(length) : 0;
                    if (sent < length)
                    {
                        ValueTask<int> sending = Target.SendAsync(_buffer.Received(length)[sent..], SocketFlags.None);
                        full = sending.IsCompleted ? full : 0; // who is slower than the source gets a buffer at a time, not four
                        await sending;
                    }

                    IsSending = false;
                }

                end = Count(length);
                full = length < bufferSize ? 0 : full + 1;
                if (full >= StreamAfter && end == PumpEnd.NotYet && isSplicing && Pipe.IsUsable && Target is not null && taps is null)
                {
                    _buffer.GiveBack();
                    end = await SpliceAsync();
                    full = 0;
                }

                if (IsTurnOver())
                {
                    _buffer.GiveBack(); // the next finds it in the processor's cache
                    await EventLoop.TurnAsync();
                }
            }

            if (taps is not null)
            {
                IsSending = true;
                await taps.First.FinishAsync();
                IsSending = false;
            }

            IsFinished = true;
            owner.Finished(this, end);
            if (end == PumpEnd.Quota)
            {
                await DiscardAsync();
            }
        }
#pragma warning disable CA1031 // the owner decides what it means
        catch (Exception e)
#pragma warning restore CA1031
        {
            owner.Failed(this, e);
        }
        finally
        {
            _buffer.GiveBack();
            owner.Release();
        }
    }

    /// <summary>What was read before there was a pump goes through its taps, too.</summary>
    private async Task<PumpEnd> OpenAsync(TapLine taps, PumpOwner owner)
    {
        taps.Start(
            error =>
            {
                IsSending = true;
                owner.Failed(this, error);
            },
            () =>
            {
                IsFinished = true;
                owner.Finished(this, PumpEnd.Tap);
            });
        IsSending = true;
        await taps.First.WriteAsync(taps.Spoken);
        IsSending = false;
        return taps.Spoken.Length > 0 ? Count(taps.Spoken.Length) : _left == 0 ? PumpEnd.Quota : PumpEnd.NotYet;
    }

    /// <summary>Until the end, or until it is no stream any more. The pipe belongs to the thread and is empty at every
    /// await: what the target does not take at once leaves it as a buffer.</summary>
    private async Task<PumpEnd> SpliceAsync()
    {
        while (true)
        {
            int most = (int)Math.Min(_left, throttle is null ? StreamFactor * bufferSize : bufferSize); // equal parts for all
            most = throttle is null ? most : await throttle.TakeAsync(most);
            Pipe? pipe = Pipe.OfThread();
            int length = pipe?.Fill(Source, most) ?? Pipe.NothingYet;
            throttle?.GiveBack(most - Math.Max(length, 0));
            if (length <= 0)
            {
                if (length == 0 || pipe is null || _burst < bufferSize)
                {
                    return PumpEnd.NotYet; // whether that was the end, a receive says
                }

                _burst = 0;
                await Source.ReceiveAsync(Memory<byte>.Empty, SocketFlags.None); // only waits
                continue;
            }

            IsSending = true;
            if (pipe!.Empty(Target!) is int rest and > 0)
            {
                await SendRestAsync(pipe, rest);
            }

            IsSending = false;
            PumpEnd end = Count(length);
            if (end != PumpEnd.NotYet)
            {
                return end;
            }

            if (IsTurnOver())
            {
                await EventLoop.TurnAsync();
            }
        }
    }

    /// <summary>After the quota. Closing a socket with bytes in it that were not received would reset it, and destroy what
    /// is on its way to the other side and back.</summary>
    private async Task<PumpEnd> DiscardAsync()
    {
        _left = long.MaxValue;
        while (await ReceiveAsync(bufferSize) is int length and > 0)
        {
            _burst += length;
            if (IsTurnOver())
            {
                await EventLoop.TurnAsync();
            }
        }

        return PumpEnd.Source;
    }

    /// <summary>The target is full, or gone: SendAsync waits, or says so.</summary>
    private async Task SendRestAsync(Pipe pipe, int length)
    {
        byte[] rest = ArrayPool<byte>.Shared.Rent(length); // rule 2
        try
        {
            pipe.Read(rest.AsSpan(0, length));
            await Target!.SendAsync(rest.AsMemory(0, length), SocketFlags.None);
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(rest);
        }
    }

    /// <summary>What the kernel takes at once of a message, which is nearly always all of it. SendAsync would begin with the
    /// same system call, and keep its event arguments (360 bytes a socket) for the next.</summary>
    private int Send(int length)
    {
        int sent = Target!.Send(_buffer.Received(length).Span, SocketFlags.None, out SocketError error);
        return error is SocketError.Success or SocketError.WouldBlock ? sent : throw new SocketException((int)error);
    }

    /// <summary>Not async itself, so that it costs no task: it only sees to the buffer while the receive waits.</summary>
    private ValueTask<int> ReceiveAsync(int most)
    {
        ValueTask<int> receiving = Source.ReceiveAsync(_buffer.ForReceive((int)Math.Min(_left, most)), SocketFlags.None);
        if (!receiving.IsCompleted)
        {
            _buffer.GiveBackWhileWaiting();
            _burst = 0;
        }

        return receiving;
    }

    /// <summary>Bytes of a rate are taken when there is something to receive: who is silent holds none.</summary>
    private async ValueTask<int> ReceiveThrottledAsync(Throttle throttle)
    {
        await Source.ReceiveAsync(Memory<byte>.Empty, SocketFlags.None); // only waits
        IsSending = true;
        int most = await throttle.TakeAsync((int)Math.Min(_left, bufferSize));
        IsSending = false;
        int length = await ReceiveAsync(most);
        throttle.GiveBack(most - length);
        return length;
    }

    private bool IsTurnOver()
    {
        bool isOver = _burst >= Burst;
        _burst = isOver ? 0 : _burst;
        return isOver;
    }

    private PumpEnd Count(int length)
    {
        Bytes += length;
        _burst += length;
        _left -= length;
        return length == 0 ? PumpEnd.Source : _left == 0 ? PumpEnd.Quota : PumpEnd.NotYet;
    }
}

/// <summary>The buffer of a pump: memory that rents its array when it is received into. While a receive waits, the
/// array is given back, and the event loop's attempt, which asks for the span anew, rents another.
/// <para>The owner (the pump) and the loop meet only there: between the moment that the receive is queued and the
/// moment that the owner gives the array back, the loop may already be receiving into it. So both claim it with one
/// CompareExchange: the loop from Held to InUse, the owner from Held to Returned.</para></summary>
internal sealed class ReceiveBuffer : MemoryManager<byte>
{
    private const int Held = 0;
    private const int InUse = 1;
    private const int Returned = 2; // _array is stale

    private byte[]? _array; // owned; rule 2
    private int _size; // at least, of an array that is rented now
    private int _state;
    private int _owner; // the thread that calls ReceiveAsync: its own first attempt needs no claim

    /// <summary>The memory to receive at most <paramref name="most"/> bytes into.</summary>
    internal Memory<byte> ForReceive(int most)
    {
        if (_state == Returned)
        {
            _array = null; // the last receive ended without an attempt
        }
        else if (_array is not null && _array.Length < most)
        {
            GiveBack();
        }

        _size = most;
        _owner = Environment.CurrentManagedThreadId;
        Volatile.Write(ref _state, Held);
        return CreateMemory(most);
    }

    internal ReadOnlyMemory<byte> Received(int length) => _array.AsMemory(0, length);

    /// <summary>The receive is queued: unless the event loop is at it already, it needs no array until it is.</summary>
    internal void GiveBackWhileWaiting()
    {
        byte[]? array = _array;
        if (Interlocked.CompareExchange(ref _state, Returned, Held) == Held && array is not null)
        {
            ArrayPool<byte>.Shared.Return(array);
        }
    }

    /// <summary>No receive is pending, and none will be.</summary>
    internal void GiveBack()
    {
        if (_state != Returned && _array is not null)
        {
            ArrayPool<byte>.Shared.Return(_array);
        }

        (_array, _state) = (null, Held);
    }

    public override Span<byte> GetSpan()
    {
        int state = Environment.CurrentManagedThreadId == _owner ? _state
            : Interlocked.CompareExchange(ref _state, InUse, Held);
        if (state == Returned || _array is null)
        {
            _array = ArrayPool<byte>.Shared.Rent(_size);
            if (state == Returned)
            {
                _state = InUse;
            }
        }

        return _array;
    }

    /// <summary>Where the operating system writes into memory later on (Windows), the array stays until it has.</summary>
    public override MemoryHandle Pin(int elementIndex = 0)
    {
        GetSpan();
        Volatile.Write(ref _state, InUse);
        return _array.AsMemory(elementIndex).Pin();
    }

    public override void Unpin()
    {
        // the handle that Pin returned is the array's own
    }

    protected override void Dispose(bool disposing) => GiveBack();
}

// ---- rates
//
// A pump with a rate takes bytes from token buckets, its own and the route's, before it receives them. Who finds too
// little waits in the line of that bucket; one thread serves the lines.

/// <summary>What one pump may receive, as its rates allow.</summary>
internal sealed class Throttle : IValueTaskSource<int>
{
    private readonly Socket _source;
    private readonly ByteRate[] _rates;
    private ManualResetValueTaskSourceCore<int> _wait = new() { RunContinuationsAsynchronously = true };
    private int _wanted;

    private Throttle(Socket source, ByteRate[] rates) => (_source, _rates) = (source, rates);

    internal static Throttle? Of(Socket source, ByteRate[] rates) => rates.Length == 0 ? null : new Throttle(source, rates);

    /// <summary>Takes up to <paramref name="most"/> bytes, when it is time; 0 where the source is closed meanwhile.</summary>
    internal async ValueTask<int> TakeAsync(int most)
    {
        for (int i = 0; i < _rates.Length; i++)
        {
            int taken = await _rates[i].TakeAsync(this, most);
            GiveBack(most - taken, i);
            most = taken;
        }

        return most;
    }

    internal void GiveBack(int bytes) => GiveBack(bytes, _rates.Length);

    /// <summary>How much it waits for in the line of a bucket, in which it stands from now on.</summary>
    internal int Wanted => _source.SafeHandle.IsClosed ? 0 : _wanted;

    internal ValueTask<int> WaitAsync(int wanted)
    {
        _wanted = wanted;
        _wait.Reset();
        return new ValueTask<int>(this, _wait.Version);
    }

    internal void Go(int bytes) => _wait.SetResult(bytes);

    public int GetResult(short token) => _wait.GetResult(token);

    public ValueTaskSourceStatus GetStatus(short token) => _wait.GetStatus(token);

    public void OnCompleted(Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags) =>
        _wait.OnCompleted(continuation, state, token, flags);

    private void GiveBack(int bytes, int count)
    {
        for (int i = 0; i < count && bytes > 0; i++)
        {
            _rates[i].GiveBack(bytes);
        }
    }
}

/// <summary>A token bucket: <paramref name="rate"/> bytes a second, given out in slices of 10 ms in the order of the line,
/// so that those who share it have equal parts. It holds what comes in 50 ms, which makes up for a late wake-up.</summary>
internal sealed class ByteRate(long rate)
{
    private const int Slices = 100; // a second
    private const int Depths = 20; // a second

    private readonly List<Throttle> _line = []; // under itself, as all below it
    private double _bytes;
    private long _filledAt = Stopwatch.GetTimestamp();

    /// <summary>None where there is no bound.</summary>
    internal static ByteRate[] Of(long rate) => rate == 0 ? [] : [new ByteRate(rate)];

    internal ValueTask<int> TakeAsync(Throttle throttle, int most)
    {
        int wanted = (int)Math.Min(most, Math.Max(1, rate / Slices));
        lock (_line)
        {
            Fill();
            if (_line.Count == 0 && _bytes >= wanted)
            {
                _bytes -= wanted;
                return new ValueTask<int>(wanted);
            }

            if (_line.Count == 0)
            {
                Pacer.Add(this);
            }

            _line.Add(throttle);
            return throttle.WaitAsync(wanted);
        }
    }

    internal void GiveBack(int bytes)
    {
        lock (_line)
        {
            _bytes += bytes;
        }
    }

    /// <summary>Lets go whom there is enough for, and who has nothing to wait for. False when nobody waits any more.</summary>
    internal bool Serve()
    {
        lock (_line)
        {
            Fill();
            bool isOver = false;
            _line.RemoveAll(throttle =>
            {
                int wanted = throttle.Wanted;
                isOver |= wanted > _bytes;
                if (isOver && wanted > 0)
                {
                    return false;
                }

                _bytes -= wanted;
                throttle.Go(wanted);
                return true;
            });
            return _line.Count > 0;
        }
    }

    private void Fill()
    {
        long now = Stopwatch.GetTimestamp();
        double most = Math.Max(1, (double)rate / Depths);
        _bytes = Math.Min(most, _bytes + ((double)(now - _filledAt) / Stopwatch.Frequency * rate));
        _filledAt = now;
    }
}

/// <summary>The one thread that serves the lines, all of them every 4 ms: hardly one in which somebody waits is not due
/// within 10. It sleeps while nobody waits.</summary>
internal static class Pacer
{
    private const int Turn = 4; // ms

    private static readonly List<ByteRate> Waiting = []; // under itself, as the next
    private static bool _isRunning;

    internal static void Add(ByteRate rate)
    {
        lock (Waiting)
        {
            Waiting.Add(rate);
            Monitor.Pulse(Waiting);
            if (!_isRunning)
            {
                _isRunning = true;
                new Thread(Run, 128 << 10) { IsBackground = true, Name = "pacer" }.Start();
            }
        }
    }

    private static void Run()
    {
        List<ByteRate> seen = [];
        while (true)
        {
            Thread.Sleep(Turn);
            seen.RemoveAll(rate => !rate.Serve());
            lock (Waiting)
            {
                while (seen.Count + Waiting.Count == 0)
                {
                    Monitor.Wait(Waiting);
                }

                seen.AddRange(Waiting);
                Waiting.Clear();
            }
        }
    }
}

// == 10  TAPS =======================================================================================================
// What looks into the bytes of a direction, or changes them. Taps stand between a pump's receive and its target, in the
// order of their options; each hands on what it makes of what it gets, and waits while those behind it do:
//
//     Pump  --->  Tap  --->  Tap  --->  Delivery  --->  target
//
// A direction that has none knows nothing of this section.

/// <summary>An option that puts taps into the connections of a route.</summary>
internal abstract class TapSettings
{
    /// <summary>Before the first connection: what all of them share.</summary>
    /// <exception cref="IOException">it cannot be had</exception>
    internal virtual void Open(Log log)
    {
    }

    /// <summary>The last connection has ended; what is still to be written is written now.</summary>
    internal virtual void Close()
    {
    }

    internal abstract void AddTo(Conversation conversation);
}

/// <summary>A tap ends the connection, with a FIN to both sides if <paramref name="isOrderly"/>, else with a reset.</summary>
#pragma warning disable CA1032 // nobody throws it without a code
internal sealed class TapException(string code, string words, bool isOrderly = false) : Exception(words)
#pragma warning restore CA1032
{
    internal string Code { get; } = code; // as of CloseReason
    internal bool IsOrderly { get; } = isOrderly;
}

/// <summary>A stage of one direction. Its pump calls it, one call at a time; what it does in its own time besides, it keeps
/// apart from that, and reports to <see cref="TapLine.Fail"/> when it throws. Waits end by the token of the line.</summary>
internal abstract class Tap
{
    internal Tap Next { get; set; } = null!; // the last one is a Delivery, which needs none
    internal TapLine Line { get; set; } = null!;

    /// <summary>The bridge stands: from now on the tap may fail in its own time.</summary>
    internal virtual void Start()
    {
    }

    /// <summary>The bytes are the caller's again when this is done.</summary>
    internal abstract ValueTask WriteAsync(ReadOnlyMemory<byte> bytes);

    /// <summary>No more bytes will come. When this is done, the target gets its FIN.</summary>
    internal virtual ValueTask FinishAsync() => Next.FinishAsync();

    /// <summary>The connection is over: with a FIN, or with a reset.</summary>
    internal virtual void End(bool isOrderly)
    {
    }
}

/// <summary>The taps of one direction of one connection.</summary>
#pragma warning disable CA1001 // a source without a timer holds nothing to dispose of
internal sealed class TapLine
#pragma warning restore CA1001
{
    private readonly CancellationTokenSource _ending = new();
    private readonly List<Tap> _taps = [];
    private Delivery? _delivery;
    private Action<Exception>? _failed;
    private Action? _finished;

    internal Tap First => _taps[0];

    /// <summary>What its client said before there was a bridge.</summary>
    internal byte[] Spoken { get; set; } = [];
    internal long Delivered => _delivery!.Bytes;
    internal CancellationToken Ending => _ending.Token;

    internal void Add(Tap tap) => _taps.Add(tap);

    internal void AddRange(TapLine line) => _taps.AddRange(line._taps);

    /// <summary>Null where there is no tap.</summary>
    internal TapLine? To(Socket? target)
    {
        if (_taps.Count == 0)
        {
            return null;
        }

        _delivery = new Delivery(target);
        _taps.Add(_delivery);
        for (int i = 1; i < _taps.Count; i++)
        {
            (_taps[i - 1].Next, _taps[i - 1].Line) = (_taps[i], this);
        }

        return this;
    }

    internal void Start(Action<Exception> failed, Action finished)
    {
        (_failed, _finished) = (failed, finished);
        _taps.ForEach(tap => tap.Start());
    }

    /// <summary>What a tap did in its own time has failed.</summary>
    internal void Fail(Exception error) => _failed!(error);

    /// <summary>A tap lets nothing more through: the target gets its FIN before the source has finished.</summary>
    internal void Finish() => _finished!();

    internal void Cancel() => _ending.Cancel();

    internal void End(bool isOrderly)
    {
        _ending.Cancel();
        _taps.ForEach(tap => tap.End(isOrderly));
    }
}

internal sealed class Delivery(Socket? target) : Tap
{
    internal long Bytes { get; private set; }

    internal override async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        while (bytes.Length > 0 && target is not null)
        {
            int sent = await target.SendAsync(bytes, SocketFlags.None);
            Bytes += sent;
            bytes = bytes[sent..];
        }
    }

    internal override ValueTask FinishAsync() => default;
}

/// <summary>A connection as its taps see it. What the echo server gets passes the taps of both directions.</summary>
internal sealed class Conversation
{
    private readonly TapLine _up = new();
    private readonly TapLine _down = new();

    internal Conversation(
        List<TapSettings> taps, string route, Socket clientSocket, EndPoint? client, Socket? serverSocket, EndPoint? server,
        bool isEcho, TimeSpan finTimeout)
    {
        (Route, Client, Server, FinTimeout) = (route, client, server, finTimeout);
        taps.ForEach(tap => tap.AddTo(this));
        if (isEcho)
        {
            _up.AddRange(_down);
        }

        Up = _up.To(isEcho ? clientSocket : serverSocket);
        Down = serverSocket is null ? null : _down.To(clientSocket);
    }

    internal string Route { get; }
    internal EndPoint? Client { get; }
    internal EndPoint? Server { get; } // null for the built-in ones
    internal TimeSpan FinTimeout { get; } // zero = off

    /// <summary>Null where that direction has no taps.</summary>
    internal TapLine? Up { get; }
    internal TapLine? Down { get; }

    internal TapLine LineOf(bool isUp) => isUp ? _up : _down;

    internal void End(bool isOrderly)
    {
        Up?.End(isOrderly);
        Down?.End(isOrderly);
    }
}

// ---- filter
//
// A child process in a direction. Both sides of it wait each on its own, so that no order in which it reads and writes can lock
// them up: what it does not read holds the source, what the target does not take holds the child.
//
//     Pump  --- WriteAsync --->  stdin | stdout  --- RunAsync --->  Next

internal sealed class FilterSettings : TapSettings
{
    private readonly bool _isUp;
    private readonly string[] _words;
    private string _path = "";
    private Log? _log;

    /// <exception cref="FormatException">it is no command</exception>
    internal FilterSettings(string command, bool isUp)
    {
        bool isShell = command.StartsWith("sh:", StringComparison.Ordinal);
        _isUp = isUp;
        _words = isShell ? ["/bin/sh", "-c", command[3..].Trim()] : Text.Words(command);
        string? wrong = !Libc.IsThere ? "works on Linux only"
            : command.Contains('\0', StringComparison.Ordinal) ? "a command has no NUL character"
            : _words.Length == 0 || _words[isShell ? ^1 : 0].Length == 0 ? "names no command" : null;
        _ = wrong is null ? wrong : throw new FormatException(wrong);
    }

    internal override void Open(Log log)
    {
        _log = log;
        _path = Child.Find(_words[0]) ?? throw new IOException(
            $"--filter-{(_isUp ? "up" : "down")}: there is no program '{_words[0]}'");
        Child.Prepare();
    }

    internal override void AddTo(Conversation conversation) =>
        conversation.LineOf(_isUp).Add(new FilterTap(this, conversation));

    /// <exception cref="TapException">it cannot be started</exception>
    internal Child Run(Conversation about) =>
        Child.Start(_path, _words, [$"TCPPROXY_CLIENT={Text.Of(about.Client)}", $"TCPPROXY_UPSTREAM={Text.Of(about.Server)}",
            $"TCPPROXY_ROUTE={about.Route}"], out int error)
        ?? throw new TapException("PD", $"filter not started: {Marshal.GetPInvokeErrorMessage(error)}");

    internal void Say(Conversation about, string text) =>
        _log!.Event(LogLevel.Warn, "filter", $"{Text.Of(about.Client)}: {text}", about.Route);
}

internal sealed class FilterTap(FilterSettings settings, Conversation about) : Tap
{
    private const int Chunk = 64 << 10; // bytes
    private const int Burst = 1 << 20; // bytes after which others of this event loop have their turn
    private const int LongestMessage = 1024; // bytes of stderr in one line of the log
    private const int MostMessages = 10; // a second

    private Task<Child> _start = null!;
    private Task _work = null!;
    private bool _isFinishing; // the source has finished
    private bool _isHeldUp; // by the target
    private int _moves; // of its output

    internal override void Start()
    {
        _start = Task.Run(() => settings.Run(about)); // blocks until its program is loaded (rule 6)
        _work = RunAsync();
    }

    internal override async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        Child child = await _start.WaitAsync(Line.Ending);
        if (_work.IsCompleted)
        {
            await _work; // which throws, unless it has finished: then what still comes is dropped
            return;
        }

        await Child.TryAsync(() => child.Pipe.SendAsync(bytes, SocketFlags.None)); // if it has ended: how, is known soon
    }

    internal override async ValueTask FinishAsync()
    {
        Child child = await _start.WaitAsync(Line.Ending);
        _isFinishing = true;
        await child.CloseInputAsync();
        TimeSpan patience = about.FinTimeout > TimeSpan.Zero ? about.FinTimeout : Timeout.InfiniteTimeSpan;
        int seen;
        do
        {
            seen = _moves;
            await Task.WhenAny(_work, Task.Delay(patience, Line.Ending));
        }
        while (!_work.IsCompleted && (_moves != seen || _isHeldUp));

        await (_work.IsCompleted ? _work : throw new TapException("PD", "filter fin timeout")); // which kills it
    }

    private async Task RunAsync()
    {
        Child? child = null;
        try
        {
            child = await _start;
            _ = Line.Ending.UnsafeRegister(static child => ((Child)child!).Kill(), child);
            _ = LogErrorsAsync(child.Errors);
            await CopyAsync(child);
            if (await child.EndAsync() is { } failure)
            {
                throw new TapException("PD", $"filter {failure}");
            }

            await Next.FinishAsync();
            if (!_isFinishing)
            {
                Line.Finish();
            }
        }
        catch (Exception e)
        {
            Line.Fail(e);
            throw; // to the pump, if it waits here or comes
        }
        finally
        {
            child?.Kill();
        }
    }

    private async Task CopyAsync(Child child)
    {
        for (int burst = 0, length = 1; length > 0;)
        {
            await Child.ReadAsync(child.Pipe, Memory<byte>.Empty); // only waits: who is silent holds no buffer
            byte[] buffer = ArrayPool<byte>.Shared.Rent(Chunk);
            try
            {
                length = await Child.ReadAsync(child.Pipe, buffer);
                _isHeldUp = true;
                await Next.WriteAsync(buffer.AsMemory(0, length));
                (_isHeldUp, _moves) = (false, _moves + 1);
            }
            finally
            {
                ArrayPool<byte>.Shared.Return(buffer);
            }

            burst += length;
            if (burst >= Burst)
            {
                burst = 0;
                await EventLoop.TurnAsync();
            }
        }
    }

    /// <summary>What it says at once is a line of the log. All is read, so that it need not wait, but not all logged.</summary>
    private async Task LogErrorsAsync(Socket errors)
    {
        byte[] bytes = new byte[LongestMessage];
        long second = 0;
        int count = 0; // in it
        using Socket owned = errors;
        for (int length; (length = await Child.ReadAsync(errors, bytes)) > 0;)
        {
            long now = Environment.TickCount64 / 1000;
            (second, count) = (now, now == second ? count + 1 : 1);
            if (count <= MostMessages)
            {
                settings.Say(about, count < MostMessages ? Encoding.UTF8.GetString(bytes, 0, length).TrimEnd()
                    : "what else it says in this second is left out");
            }
        }
    }
}

// == 11  PREREAD ====================================================================================================
// The first bytes of a connection, where a route asks for them: a PROXY header that says who the client is
// (--accept-proxy), a TLS hello that says whom it wants (--sni), a PROXY header of our own to the server (--send-proxy).
// What was read beyond the first header goes to the server unaltered. All this is over, and its buffer given back, when
// the bridge begins.
//
// A parser is given all bytes so far and returns how many it takes: 0 is "more", unless it says what is wrong.

internal enum ProxyVersion
{
    Off,
    V1,
    V2,
}

/// <summary>The PROXY protocol, as haproxy.org's doc/proxy-protocol.txt has it.</summary>
internal static class ProxyHeader
{
    internal const int LongestWritten = Fixed + UnixSize;

    private const int LongestV1 = 107; // bytes with CR LF: the protocol's 2.1
    private const int LongestV2 = 4096; // bytes; the protocol would allow 65,551
    private const int Fixed = 16; // bytes of version 2 before the addresses
    private const int Local = 0x20; // version and command: the sender speaks for itself, there is no client
    private const int Proxied = 0x21;
    private const int Tcp4 = 0x11; // address family and protocol
    private const int Tcp6 = 0x21;
    private const int UnixStream = 0x31;
    private const int Tcp4Size = 12; // bytes of both addresses and ports
    private const int Tcp6Size = 36;
    private const int UnixSize = 2 * UnixPath;
    private const int UnixPath = 108;
    private const int ChecksumType = 0x03; // PP2_TYPE_CRC32C

    private static ReadOnlySpan<byte> SignatureV1 => "PROXY "u8;

    private static ReadOnlySpan<byte> SignatureV2 => "\r\n\r\n\0\r\nQUIT\n"u8;

    /// <summary>Both addresses stay null where the sender does not say: those of the connection are the client's.</summary>
    internal static int Parse(
        ReadOnlySpan<byte> bytes, out EndPoint? source, out EndPoint? destination, out string? wrong)
    {
        (source, destination, wrong) = (null, null, null);
        bool isV2 = bytes.CommonPrefixLength(SignatureV2) == Math.Min(bytes.Length, SignatureV2.Length);
        bool isV1 = bytes.CommonPrefixLength(SignatureV1) == Math.Min(bytes.Length, SignatureV1.Length);
        wrong = isV1 || isV2 ? null : "no PROXY header";
        return isV2 && bytes.Length >= Fixed ? ParseV2(bytes, ref source, ref destination, out wrong)
            : isV1 ? ParseV1(bytes[..Math.Min(bytes.Length, LongestV1)], ref source, ref destination, out wrong) : 0;
    }

    private static int ParseV1(
        ReadOnlySpan<byte> bytes, ref EndPoint? source, ref EndPoint? destination, out string? wrong)
    {
        int end = bytes.IndexOfAny((byte)'\r', (byte)'\n');
        bool isCut = end < 0 || (end == bytes.Length - 1 && bytes[end] == '\r');
        wrong = isCut && bytes.Length == LongestV1 ? $"PROXY header longer than {LongestV1} bytes"
            : !isCut && !bytes[end..].StartsWith("\r\n"u8) ? "PROXY header that does not end with CR LF" : null;
        if (isCut || wrong is not null)
        {
            return 0;
        }

        string line = Encoding.UTF8.GetString(bytes[..end]);
        string[] words = line.Split(' ');
        bool isV6 = words[1] == "TCP6";
        IPEndPoint? from = null;
        IPEndPoint? to = null;
        if (words.Length == 6 && (isV6 || words[1] == "TCP4"))
        {
            (from, to) = (Read(words[2], words[4], isV6), Read(words[3], words[5], isV6));
        }

        bool isKnown = from is not null && to is not null;
        (source, destination) = isKnown ? (from, to) : (null, null);
        wrong = isKnown || words[1] == "UNKNOWN" ? null : $"malformed PROXY header '{line}'";
        return wrong is null ? end + 2 : 0;
    }

    /// <summary>Null when it is not written as inet_ntop(3) would.</summary>
    private static IPEndPoint? Read(string address, string port, bool isV6) =>
        address.AsSpan().IndexOfAny('%', '[', '/') < 0 && IPAddress.TryParse(address, out IPAddress? ip)
            && ip.AddressFamily == (isV6 ? AddressFamily.InterNetworkV6 : AddressFamily.InterNetwork)
            && (isV6 || ip.ToString() == address)
            && Text.IsDigits(port) && port.Length <= 5 && (port[0] != '0' || port.Length == 1)
            && int.Parse(port, CultureInfo.InvariantCulture) is int number and <= Address.HighestPort
            ? new IPEndPoint(ip, number) : null;

    private static int ParseV2(
        ReadOnlySpan<byte> bytes, ref EndPoint? source, ref EndPoint? destination, out string? wrong)
    {
        bool isLocal = bytes[12] == Local; // then what follows is of no meaning
        int family = bytes[13];
        int end = Fixed + BinaryPrimitives.ReadUInt16BigEndian(bytes[14..]);
        int addresses = (family >> 4) switch { 0 => Fixed, 1 => Fixed + Tcp4Size, 2 => Fixed + Tcp6Size, _ => Fixed + UnixSize };
        wrong = !isLocal && bytes[12] != Proxied ? "PROXY header of an unknown version or command"
            : end > LongestV2 ? $"PROXY header longer than {LongestV2} bytes"
            : isLocal ? null
            : family >> 4 > 3 || (family & 15) > 2 ? "PROXY header of an unknown address family"
            : end < addresses ? "PROXY header shorter than its addresses"
            : bytes.Length < end ? null : CheckExtensions(bytes[..end], addresses);
        if (wrong is not null || bytes.Length < end)
        {
            return 0;
        }

        int half = Fixed + (family == Tcp4 ? 4 : 16);
        if (!isLocal && family is Tcp4 or Tcp6)
        {
            source = Read(bytes[Fixed..half], bytes[(addresses - 4)..]);
            destination = Read(bytes[half..(addresses - 4)], bytes[(addresses - 2)..]);
        }
        else if (!isLocal && family == UnixStream)
        {
            source = ReadPath(bytes.Slice(Fixed, UnixPath));
            destination = ReadPath(bytes.Slice(Fixed + UnixPath, UnixPath));
        }

        return end;

        static IPEndPoint Read(ReadOnlySpan<byte> address, ReadOnlySpan<byte> port) =>
            new(new IPAddress(address), BinaryPrimitives.ReadUInt16BigEndian(port));
    }

    /// <summary>Null when it has no name, as a client's socket mostly, or none that can be said.</summary>
    private static UnixDomainSocketEndPoint? ReadPath(ReadOnlySpan<byte> path)
    {
        int end = path[1..].IndexOf((byte)0); // the first byte of an abstract name is 0
        string name = Encoding.UTF8.GetString(end < 0 ? path : path[..(end + 1)]);
        return name is "\0" || Encoding.UTF8.GetByteCount(name) > Address.LongestPath ? null : new(name);
    }

    /// <summary>TLVs are passed over, but a checksum must be right.</summary>
    private static string? CheckExtensions(ReadOnlySpan<byte> header, int at)
    {
        while (at < header.Length)
        {
            int value = at + 3;
            int end = value <= header.Length ? value + BinaryPrimitives.ReadUInt16BigEndian(header[(at + 1)..]) : int.MaxValue;
            if (end > header.Length)
            {
                return "PROXY header with a cut extension";
            }

            if (header[at] == ChecksumType
                && (end != value + 4 || BinaryPrimitives.ReadUInt32BigEndian(header[value..]) != Checksum(header, value)))
            {
                return "PROXY header with a wrong checksum";
            }

            at = end;
        }

        return null;
    }

    /// <summary>CRC-32C with the four bytes of the checksum itself taken as 0.</summary>
    private static uint Checksum(ReadOnlySpan<byte> header, int field)
    {
        uint crc = uint.MaxValue;
        for (int i = 0; i < header.Length; i++)
        {
            crc = BitOperations.Crc32C(crc, i >= field && i < field + 4 ? (byte)0 : header[i]);
        }

        return ~crc;
    }

    /// <summary>Writes a header of <see cref="LongestWritten"/> bytes at most and returns its length. Without addresses it
    /// is one that speaks for nobody, as a health check wants it: LOCAL, in version 1 UNKNOWN. As HAProxy does, addresses
    /// of two families are both written as IPv6, in version 1 as UNKNOWN.</summary>
    internal static int Write(Span<byte> to, ProxyVersion version, EndPoint? source, EndPoint? destination)
    {
        (IPAddress? from, IPAddress? at) = (Plain(source), Plain(destination));
        (int fromPort, int atPort) = ((source as IPEndPoint)?.Port ?? 0, (destination as IPEndPoint)?.Port ?? 0);
        bool isIp = from is not null && at is not null;
        bool isSame = isIp && from!.AddressFamily == at!.AddressFamily;
        bool isV4 = isSame && from!.AddressFamily == AddressFamily.InterNetwork;
        if (version == ProxyVersion.V1)
        {
            return Encoding.UTF8.GetBytes(!isSame ? "PROXY UNKNOWN\r\n"
                : $"PROXY {(isV4 ? "TCP4" : "TCP6")} {from} {at} {Text.Of(fromPort)} {Text.Of(atPort)}\r\n", to);
        }

        bool isUnix = source is UnixDomainSocketEndPoint && destination is UnixDomainSocketEndPoint;
        int size = isV4 ? Tcp4Size : isIp ? Tcp6Size : isUnix ? UnixSize : 0;
        Span<byte> addresses = to.Slice(Fixed, size);
        addresses.Clear();
        SignatureV2.CopyTo(to);
        to[12] = source is null ? (byte)Local : (byte)Proxied;
        to[13] = isV4 ? (byte)Tcp4 : isIp ? (byte)Tcp6 : isUnix ? (byte)UnixStream : (byte)0;
        BinaryPrimitives.WriteUInt16BigEndian(to[14..], (ushort)size);
        if (isIp)
        {
            _ = (isV4 ? from! : from!.MapToIPv6()).TryWriteBytes(addresses, out int half);
            _ = (isV4 ? at! : at!.MapToIPv6()).TryWriteBytes(addresses[half..], out _);
            BinaryPrimitives.WriteUInt16BigEndian(addresses[^4..], (ushort)fromPort);
            BinaryPrimitives.WriteUInt16BigEndian(addresses[^2..], (ushort)atPort);
        }
        else if (isUnix)
        {
            WritePath(source!, addresses[..UnixPath]);
            WritePath(destination!, addresses[UnixPath..]);
        }

        return Fixed + size;

        static IPAddress? Plain(EndPoint? endPoint) => endPoint is not IPEndPoint { Address: IPAddress address } ? null
            : address.IsIPv4MappedToIPv6 ? address.MapToIPv4() : new IPAddress(address.GetAddressBytes()); // without a scope

        static void WritePath(EndPoint endPoint, Span<byte> to)
        {
            const int Family = 2; // bytes before the path of a sockaddr_un
            SocketAddress address = endPoint.Serialize();
            address.Buffer.Span[Family..Math.Min(address.Size, Family + to.Length)].CopyTo(to);
        }
    }
}

/// <summary>A TLS server name, as asked for (RFC 6066, 3) or, perhaps with *. in front, as configured.</summary>
internal static class ServerName
{
    private const int Handshake = 22; // RFC 8446, 5.1: the type of a record
    private const int RecordHeader = 5; // bytes: type, version, length
    private const int LongestRecord = 1 << 14;
    private const int ClientHello = 1; // RFC 8446, 4: the type of a message
    private const int MessageHeader = 4; // bytes: type, length

    /// <summary>Finds it in a ClientHello, which may be spread over any number of records; null without one.</summary>
    internal static int Parse(ReadOnlySpan<byte> bytes, out string? name, out string? wrong)
    {
        name = null;
        byte[] message = ArrayPool<byte>.Shared.Rent(bytes.Length);
        try
        {
            int taken = Gather(bytes, message, out int length, out wrong);
            if (taken > 0 && !Find(message.AsSpan(MessageHeader, length), ref name))
            {
                (taken, wrong) = (0, "a malformed TLS hello");
            }

            return taken;
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(message);
        }
    }

    /// <summary>The first message out of the records that carry it.</summary>
    private static int Gather(ReadOnlySpan<byte> bytes, Span<byte> message, out int length, out string? wrong)
    {
        (length, wrong) = (0, null);
        int gathered = 0;
        while (!bytes.IsEmpty)
        {
            int size = bytes.Length < RecordHeader ? 1 : BinaryPrimitives.ReadUInt16BigEndian(bytes[3..]);
            int end = Math.Min(bytes.Length, RecordHeader + size);
            ReadOnlySpan<byte> part = bytes[Math.Min(end, RecordHeader)..end];
            part.CopyTo(message[gathered..]);
            gathered += part.Length;
            if (bytes[0] != Handshake || (bytes.Length > 1 && bytes[1] != 3) || size is 0 or > LongestRecord
                || (gathered > 0 && message[0] != ClientHello))
            {
                wrong = "no TLS hello";
                return 0;
            }

            bytes = bytes[end..];
            length = gathered < MessageHeader ? 0 : (int)(BinaryPrimitives.ReadUInt32BigEndian(message) & 0xffffff);
            if (gathered >= MessageHeader && gathered >= MessageHeader + length)
            {
                return gathered;
            }
        }

        return 0;
    }

    /// <summary>RFC 8446, 4.1.2. False when it is malformed.</summary>
    private static bool Find(ReadOnlySpan<byte> hello, ref string? name)
    {
        const int VersionAndRandom = 34; // bytes
        if (hello.Length < VersionAndRandom || hello[0] != 3)
        {
            return false;
        }

        ReadOnlySpan<byte> rest = hello[VersionAndRandom..];
        bool isGood = Take(ref rest, 1, out _) && Take(ref rest, 2, out _) && Take(ref rest, 1, out _); // session, ciphers, ...
        ReadOnlySpan<byte> extensions = default;
        isGood = isGood && (rest.IsEmpty || Take(ref rest, 2, out extensions)); // TLS 1.2 may do without
        while (isGood && extensions.Length > 0)
        {
            bool isName = extensions.StartsWith((ReadOnlySpan<byte>)[0, 0]);
            isGood = Take(ref extensions, 2, out ReadOnlySpan<byte> extension, skip: 2);
            if (isGood && isName)
            {
                // a list of one name, of the one type that there is: 0
                return Take(ref extension, 2, out ReadOnlySpan<byte> list) && list.Length > 0 && list[0] == 0
                    && Take(ref list, 2, out ReadOnlySpan<byte> host, skip: 1)
                    && (name = Read(Encoding.UTF8.GetString(host))) is not null;
            }
        }

        return isGood;
    }

    /// <summary>Cuts a vector with a length of so many bytes, after <paramref name="skip"/> others, off the front.</summary>
    private static bool Take(scoped ref ReadOnlySpan<byte> rest, int prefix, out ReadOnlySpan<byte> vector, int skip = 0)
    {
        int start = skip + prefix;
        int length = rest.Length < start ? int.MaxValue
            : prefix == 1 ? rest[skip] : BinaryPrimitives.ReadUInt16BigEndian(rest[skip..]);
        bool isThere = length <= rest.Length - start;
        vector = isThere ? rest.Slice(start, length) : default;
        rest = isThere ? rest[(start + length)..] : rest;
        return isThere;
    }

    /// <summary>In lower case; null when it is none.</summary>
    private static string? Read(string name)
    {
        const int Longest = 253; // characters: RFC 1035, 2.3.4, as text
        bool isName = name.Length is > 0 and <= Longest && name[0] != '.' && name[^1] != '.'
            && !name.Contains("..", StringComparison.Ordinal);
        char[] letters = name.ToCharArray();
        for (int i = 0; i < letters.Length; i++)
        {
            isName &= char.IsAsciiLetterOrDigit(letters[i]) || letters[i] is '-' or '.' or '_';
            letters[i] |= char.IsAsciiLetterUpper(letters[i]) ? ' ' : '\0';
        }

        return isName ? new string(letters) : null;
    }

    /// <summary>NAME[,NAME...], each of which may be *.NAME.</summary>
    /// <exception cref="FormatException">one is no name</exception>
    internal static string[] ParseList(string text) => Array.ConvertAll(text.Split(','), word =>
        word.StartsWith("*.", StringComparison.Ordinal) && Read(word[2..]) is { } parent ? $"*.{parent}"
        : Read(word) ?? throw new FormatException($"'{word}' is not a server name; write www.example.com or *.example.com"));
}

internal sealed class PrereadSettings
{
    private const string Unix = "unix";

    private IPNetwork[] _senders = [];
    private bool _isFromUnix;

    internal TimeSpan Timeout { get; set; } // zero = off
    internal bool HasSenders => _isFromUnix || _senders.Length > 0;

    internal PrereadSettings Clone() => (PrereadSettings)MemberwiseClone();

    /// <summary>Who must send a PROXY header: CIDR[,CIDR...], where unix stands for whoever comes by a unix socket.</summary>
    /// <exception cref="FormatException">one is no network</exception>
    internal void AcceptProxy(string text)
    {
        string[] words = text == "off" ? [] : text.Split(',');
        _isFromUnix = Array.IndexOf(words, Unix) >= 0;
        _senders = Array.ConvertAll(Array.FindAll(words, word => word != Unix), Network.Parse);
    }

    internal bool IsSender(EndPoint? client) => client is not IPEndPoint ip ? _isFromUnix
        : Array.Exists(_senders, network => Network.Has(network, ip.Address));
}

/// <summary>Why it went no further: HAProxy's two letters, and words.</summary>
internal sealed class Refusal(string code, string words)
{
    internal string Code { get; } = code;
    internal string Words { get; } = words;
}

/// <summary>Closes a socket that is waited for in vain: it is late, or the process ends.</summary>
internal sealed class Patience : Watched, IDisposable
{
    private readonly Socket _socket; // not owned, but closed when it is over
    private readonly long _deadline;
    private readonly string _late; // HAProxy's letters of the two
    private readonly string _stopped;
    private string? _end; // one of them, or "" when it came in time: whoever is first

    internal Patience(Socket socket, TimeSpan time, string late, string stopped)
    {
        (_socket, _late, _stopped) = (socket, late, stopped);
        _deadline = time > TimeSpan.Zero ? Environment.TickCount64 + (long)time.TotalMilliseconds : long.MaxValue;
        Sweep.Add(this);
    }

    public void Dispose() => Sweep.Remove(this);

    /// <summary>What was waited for has happened: <paramref name="refusal"/> or null is the outcome, unless the socket was
    /// closed before.</summary>
    internal Refusal? End(Refusal? refusal, string lateWords) =>
        Interlocked.CompareExchange(ref _end, "", null) is not { } end ? refusal
        : new Refusal(end, end == _late ? lateWords : "shutdown");

    internal override bool Check(long now)
    {
        if (now >= _deadline)
        {
            Close(_late);
        }

        return true;
    }

    internal override void Stop() => Close(_stopped);

    private void Close(string end)
    {
        if (Interlocked.CompareExchange(ref _end, end, null) is null)
        {
            _socket.Close(0); // a reset, which also makes the pending receive or send end
        }
    }
}

/// <summary>What a client sent before its bridge: read, understood, and sent on behind a header of our own.</summary>
internal sealed class FirstBytes : IDisposable
{
    private const int Least = 2 << 10; // bytes of the buffer: most hellos fit
    private const int Most = 32 << 10;

    private byte[] _buffer = []; // rented; disposed by Dispose
    private int _start = ProxyHeader.LongestWritten; // of what is to be sent on; room for a header is kept in front of it
    private int _end = ProxyHeader.LongestWritten;
    private string? _name;
    private string? _wrong; // why there is no name

    /// <summary>The client that a PROXY header named, and where it had connected to.</summary>
    internal EndPoint? Source { get; private set; }
    internal EndPoint? Destination { get; set; }

    /// <summary>The TLS server that the client asks for; null when it asks for none.</summary>
    internal string? Name => _name;
    internal string Whom => _name ?? $"a client with {_wrong ?? "no TLS server name"}";

    /// <summary>What the client sent beyond a PROXY header.</summary>
    internal int Length => _end - _start;

    public void Dispose()
    {
        if (_buffer.Length > 0)
        {
            ArrayPool<byte>.Shared.Return(_buffer);
            _buffer = [];
        }
    }

    internal byte[] Copy(int length) => _buffer.AsSpan(_start, length).ToArray();

    /// <summary>Null when all that was asked for has come.</summary>
    internal async Task<Refusal?> ReadAsync(Socket client, bool isHeader, bool isHello, TimeSpan time)
    {
        using Patience patience = new(client, time, "cR", "KR");
        Refusal? refusal;
        try
        {
            await client.ReceiveAsync(Memory<byte>.Empty, SocketFlags.None); // who says nothing holds no buffer
            do
            {
                Grow();
                int length = await client.ReceiveAsync(_buffer.AsMemory(_end), SocketFlags.None);
                _end += length;
                refusal = Understand(ref isHeader, ref isHello);
                if (refusal is null && (isHeader || isHello))
                {
                    refusal = length == 0 ? new("CR", $"client closed before the end of the {What(isHeader)}")
                        : _end >= Most ? new("PR", $"{What(isHeader)} too long") : null;
                }
            }
            while (refusal is null && (isHeader || isHello));
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            refusal = new("CR", "client reset");
        }

        return patience.End(refusal, $"no {What(isHeader)} in time");
    }

    private static string What(bool isHeader) => isHeader ? "PROXY header" : "TLS hello";

    private Refusal? Understand(ref bool isHeader, ref bool isHello)
    {
        if (isHeader)
        {
            int taken = ProxyHeader.Parse(
                _buffer.AsSpan(_start, Length), out EndPoint? source, out EndPoint? destination, out string? wrong);
            if (wrong is not null)
            {
                return new Refusal("PR", wrong);
            }

            (Source, Destination) = (source, destination);
            _start += taken;
            isHeader = taken == 0;
        }

        if (!isHeader && isHello)
        {
            isHello = ServerName.Parse(_buffer.AsSpan(_start, Length), out _name, out _wrong) == 0 && _wrong is null;
        }

        return null;
    }

    private void Grow()
    {
        if (_end >= _buffer.Length)
        {
            byte[] larger = ArrayPool<byte>.Shared.Rent(Math.Max(Least, 2 * _buffer.Length));
            _buffer.CopyTo(larger, 0);
            Dispose();
            _buffer = larger;
        }
    }

    /// <summary>Puts a PROXY header of our own in front of what is sent.</summary>
    internal int Head(ProxyVersion version, EndPoint? source, EndPoint? destination)
    {
        Grow();
        Span<byte> header = stackalloc byte[ProxyHeader.LongestWritten];
        header = header[..ProxyHeader.Write(header, version, source, destination)];
        header.CopyTo(_buffer.AsSpan(_start -= header.Length));
        return header.Length;
    }

    /// <summary>Sends the first <paramref name="length"/> bytes. Null when they are sent.</summary>
    internal async Task<Refusal?> SendAsync(Socket target, int length, TimeSpan time)
    {
        using Patience patience = new(target, time, "sC", "KC");
        Refusal? refusal = null;
        try
        {
            await target.SendAsync(_buffer.AsMemory(_start, length), SocketFlags.None);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            refusal = new("SD", "upstream reset");
        }

        return patience.End(refusal, "connect timeout");
    }
}

// == 12  OBSERVE ====================================================================================================
// Log lines. Whoever has something to say puts it in a bounded queue and goes on; a thread of its own formats and
// writes. A reader that does not read blocks that thread and nothing else: lines beyond the queue are dropped,
// counted, and the count is said when the reader is back.

internal enum LogFormat
{
    Text,
    Json,
    Off,
}

internal enum LogLevel
{
    Debug,
    Info,
    Warn,
    Error,
}

internal sealed class LogSettings
{
    internal LogFormat Format { get; set; }
    internal string? File { get; set; } // null = stderr
    internal LogLevel Level { get; set; }
}

/// <summary>One line: when, how bad, what; the other keys are the subclass's.</summary>
internal abstract class LogLine(LogLevel level, string name)
{
    private DateTime _time;

    internal LogLevel Level { get; } = level;

    internal void Stamp() => _time = DateTime.UtcNow;

    internal void Format(LogText text)
    {
        text.Begin();
        text.Add("time", Text.Of(_time));
        text.Add("level", Level switch
        {
            LogLevel.Debug => "debug",
            LogLevel.Info => "info",
            LogLevel.Warn => "warn",
            _ => "error",
        });
        text.Add("event", name);
        AddKeys(text);
        text.End();
    }

    protected abstract void AddKeys(LogText text);
}

internal sealed class MessageLine(LogLevel level, string name, string? route, string message) : LogLine(level, name)
{
    protected override void AddKeys(LogText text)
    {
        if (route is not null)
        {
            text.Add("route", route);
        }

        if (message.Length > 0)
        {
            text.Add("message", message);
        }
    }
}

/// <summary>A line whose point is a number.</summary>
internal sealed class CountLine(LogLevel level, string name, string key, long count) : LogLine(level, name)
{
    protected override void AddKeys(LogText text) => text.Add(key, count);
}

/// <summary>A server goes down or comes up.</summary>
internal sealed class ServerLine(LogLevel level, string route, string server, string state, string reason)
    : LogLine(level, "server")
{
    protected override void AddKeys(LogText text)
    {
        text.Add("route", route);
        text.Add("server", server);
        text.Add("state", state);
        text.Add("reason", reason);
    }
}

internal sealed class ListeningLine(string route, string listen, string upstream) : LogLine(LogLevel.Info, "listening")
{
    protected override void AddKeys(LogText text)
    {
        text.Add("route", route);
        text.Add("listen", listen);
        text.Add("upstream", upstream);
    }
}

/// <summary>The life of one connection, filled in as it goes.</summary>
internal sealed class ConnectionLine(string route) : LogLine(LogLevel.Info, "connection")
{
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private EndPoint? _server;
    private long _connectTime = -1; // ms, as below; -1 = never connected
    private long _duration;
    private string _end = "";
    private string _reason = "";

    internal EndPoint? Client { get; set; }
    internal int Place { get; set; } = -1; // of its address, where those are counted
    internal string Target { get; set; } = "-"; // the upstream as it was written
    internal long BytesUp { get; set; }
    internal long BytesDown { get; set; }

    internal void Connected(EndPoint? server)
    {
        _server = server;
        _connectTime = (long)Stopwatch.GetElapsedTime(_startedAt).TotalMilliseconds;
    }

    internal void Ended(string end, string reason)
    {
        (_end, _reason) = (end, reason);
        _duration = (long)Stopwatch.GetElapsedTime(_startedAt).TotalMilliseconds;
    }

    protected override void AddKeys(LogText text)
    {
        text.Add("route", route);
        text.Add("client", Text.Of(Client));
        text.Add("upstream", Target);
        text.Add("server", Text.Of(_server));
        text.Add("connect_ms", _connectTime);
        text.Add("duration_ms", _duration);
        text.Add("bytes_up", BytesUp);
        text.Add("bytes_down", BytesDown);
        text.Add("end", _end);
        text.Add("reason", _reason);
    }
}

/// <summary>Lines as bytes: logfmt, or JSON with the same keys.</summary>
internal sealed class LogText(bool isJson)
{
    private byte[] _bytes = new byte[1024];
    private int _length;
    private bool _isFirst;

    internal ReadOnlySpan<byte> Bytes => _bytes.AsSpan(0, _length);

    internal void Clear() => _length = 0;

    internal void Begin()
    {
        _isFirst = true;
        Append(isJson ? "{" : "");
    }

    internal void End() => Append(isJson ? "}\n" : "\n");

    internal void Add(string key, string value)
    {
        Key(key);
        bool isPlain = !isJson && value.Length > 0 && value.AsSpan().IndexOfAnyExceptInRange('!', '~') < 0
            && value.AsSpan().IndexOfAny('"', '=', '\\') < 0;
        Append(isPlain ? value : $"\"{Text.Escape(value)}\"");
    }

    internal void Add(string key, long value)
    {
        Key(key);
        Append(value.ToString(CultureInfo.InvariantCulture));
    }

    private void Key(string key)
    {
        Append(isJson ? _isFirst ? "\"" : ",\"" : _isFirst ? "" : " ");
        Append(key);
        Append(isJson ? "\":" : "=");
        _isFirst = false;
    }

    private void Append(string text)
    {
        int most = Encoding.UTF8.GetMaxByteCount(text.Length);
        if (_length + most > _bytes.Length)
        {
            Array.Resize(ref _bytes, Math.Max(2 * _bytes.Length, _length + most));
        }

        _length += Encoding.UTF8.GetBytes(text, _bytes.AsSpan(_length));
    }
}

internal sealed class Log : IDisposable
{
    private const int QueueLength = 8192; // lines; about two megabytes when full
    private const int Gather = 10; // ms: the writer wakes once for what comes within this time
    private const int Chunk = 32 << 10; // bytes written at once

    private readonly LogSettings _settings;
    private readonly Queue<LogLine> _queue = []; // under itself, as all below it
    private bool _isWaiting; // the writer, for a first line
    private bool _isStopping;
    private long _dropped;
    private FileStream? _file; // owned; disposed by the writer; null = stderr
    private Thread? _writer;

    internal Log(LogSettings settings) => _settings = settings;

    public void Dispose() => Stop(0);

    /// <exception cref="IOException">the file cannot be opened</exception>
    internal void Start()
    {
        if (_settings.Format == LogFormat.Off)
        {
            return;
        }

        try
        {
            _file = _settings.File is not { } file ? null
                : new FileStream(file, FileMode.Append, FileAccess.Write, FileShare.ReadWrite | FileShare.Delete, 0);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new IOException($"--log-file: cannot open {_settings.File}: {Text.Reason(e)}");
        }

        _writer = new Thread(WriteAll, 128 << 10) { IsBackground = true, Name = "log" };
        _writer.Start();
    }

    /// <summary>Lets the writer write what is queued, for up to <paramref name="patience"/> milliseconds.</summary>
    internal void Stop(int patience)
    {
        lock (_queue)
        {
            _isStopping = true;
            Monitor.Pulse(_queue);
        }

        _writer?.Join(patience);
    }

    internal void Event(LogLevel level, string name, string message, string? route = null) =>
        Write(new MessageLine(level, name, route, message));

    internal void Count(LogLevel level, string name, string key, long count) =>
        Write(new CountLine(level, name, key, count));

    internal void Listening(string route, string listen, string upstream) =>
        Write(new ListeningLine(route, listen, upstream));

    internal void ServerState(string route, string server, bool isUp, string reason) =>
        Write(new ServerLine(isUp ? LogLevel.Info : LogLevel.Warn, route, server, isUp ? "up" : "down", reason));

    internal void Ended(ConnectionLine line) => Write(line);

    internal bool Has(LogLevel level) => level >= _settings.Level && _writer is not null;

    private void Write(LogLine line)
    {
        if (!Has(line.Level))
        {
            return;
        }

        line.Stamp();
        lock (_queue)
        {
            if (_queue.Count == QueueLength)
            {
                _dropped++;
                return;
            }

            _queue.Enqueue(line);
            if (_isWaiting)
            {
                _isWaiting = false;
                Monitor.Pulse(_queue);
            }
        }
    }

    // ---- the writer

    private void WriteAll()
    {
        LogText text = new(_settings.Format == LogFormat.Json);
        List<LogLine> lines = [];
        while (Take(lines))
        {
            foreach (LogLine line in lines)
            {
                line.Format(text);
                if (text.Bytes.Length >= Chunk)
                {
                    WriteOut(text);
                }
            }

            WriteOut(text);
            lines.Clear();
        }

        _file?.Dispose();
    }

    /// <summary>Waits for lines and takes them; false when there are none and none will come.</summary>
    private bool Take(List<LogLine> lines)
    {
        lock (_queue)
        {
            while (_queue.Count == 0 && !_isStopping)
            {
                _isWaiting = true;
                Monitor.Wait(_queue);
            }

            if (!_isStopping)
            {
                Monitor.Wait(_queue, Gather); // nobody pulses now but Stop
            }

            lines.AddRange(_queue);
            _queue.Clear();
            if (_dropped > 0)
            {
                lines.Add(new MessageLine(LogLevel.Warn, "log", null,
                    $"{Text.Count(_dropped, "line")} dropped: the reader of the log is too slow"));
                lines[^1].Stamp();
                _dropped = 0;
            }

            return lines.Count > 0;
        }
    }

    private void WriteOut(LogText text)
    {
        try
        {
            if (_file is null)
            {
                StandardStream.TryWrite(StandardStream.Error, text.Bytes);
            }
            else
            {
                if (_file.CanSeek)
                {
                    _file.Seek(0, SeekOrigin.End); // which is elsewhere once somebody has truncated it
                }

                _file.Write(text.Bytes);
            }
        }
        catch (IOException)
        {
            // the disk is full: traffic goes on without a log
        }

        text.Clear();
    }
}

// == 13  PLATFORM ===================================================================================================
// What stands on the operating system and the runtime, and the words that people type: the sweep, the event loop's
// settings, descriptors, socket options, libc; addresses, units, text. A libc call is never needed: where it is
// missing, the portable path serves.

/// <summary>Something with timeouts.</summary>
internal abstract class Watched
{
    internal int Place { get; set; } = -1; // in the sweep's list; -1 = not there

    /// <summary>Called now and then by the sweep's thread, possibly once more after it was removed. False when nothing
    /// has happened since the last time.</summary>
    internal abstract bool Check(long now);

    /// <summary>Called instead once the process is to end.</summary>
    internal abstract void Stop();
}

/// <summary>One thread looks at everything that has a timeout, again and again, instead of a timer for each. It looks
/// as often as an eighth of the shortest timeout, half as often while all is quiet, and not at all while there is nothing
/// to look at.</summary>
internal static class Sweep
{
    private const int Shortest = 25; // ms between two looks
    private const int Longest = 1000;
    private static readonly Lock Gate = new();
    private static readonly AutoResetEvent Bell = new(false);
    private static Watched[] _watched = new Watched[64];
    private static int _count;
    private static bool _isAsleep;
    private static int _interval;
    private static long _stopAllAt = long.MaxValue;

    internal static void Start(IEnumerable<TimeSpan> bounds)
    {
        double least = Longest * 8;
        foreach (TimeSpan bound in bounds)
        {
            least = bound > TimeSpan.Zero ? Math.Min(least, bound.TotalMilliseconds) : least;
        }

        _interval = Math.Max(Shortest, (int)least / 8);
        new Thread(Run, 128 << 10) { IsBackground = true, Name = "sweep" }.Start();
    }

    internal static void Add(Watched watched)
    {
        lock (Gate)
        {
            if (_count == _watched.Length)
            {
                Array.Resize(ref _watched, 2 * _count);
            }

            watched.Place = _count;
            _watched[_count++] = watched;
            if (_isAsleep)
            {
                _isAsleep = false;
                Bell.Set();
            }
        }
    }

    internal static void Remove(Watched watched)
    {
        lock (Gate)
        {
            if (watched.Place >= 0)
            {
                Watched last = _watched[--_count];
                _watched[last.Place = watched.Place] = last;
                _watched[_count] = null!;
                watched.Place = -1;
            }
        }
    }

    /// <summary>The end of the process: what is still watched at <paramref name="time"/> (TickCount64) is stopped.</summary>
    internal static void StopAllAt(long time)
    {
        Volatile.Write(ref _stopAllAt, time);
        Bell.Set();
    }

    private static void Run()
    {
        Watched[] seen = [];
        Rest rest = new();
        bool isQuiet = false;
        while (true)
        {
            int pause = isQuiet ? Math.Min(2 * _interval, Longest) : _interval;
            Bell.WaitOne(!IsEmpty() ? pause : rest.IsDue ? Rest.Quiet : Timeout.Infinite);
            int count;
            lock (Gate)
            {
                count = _count;
                seen = seen.Length < count ? new Watched[_watched.Length] : seen;
                Array.Copy(_watched, seen, count);
            }

            long now = Environment.TickCount64;
            bool isStop = now >= Volatile.Read(ref _stopAllAt);
            isQuiet = true;
            foreach (Watched watched in seen.AsSpan(0, count))
            {
                if (isStop)
                {
                    watched.Stop();
                }
                else
                {
                    isQuiet &= !watched.Check(now);
                }
            }

            Array.Clear(seen, 0, count);
            rest.Look(isQuiet, now);
        }
    }

    private static bool IsEmpty()
    {
        lock (Gate)
        {
            return _isAsleep = _count == 0;
        }
    }
}

/// <summary>Collects garbage when it disturbs nobody. The pause is 3 ms with 1,000 connections and 26 with 9,000, of which
/// each then takes 3.1 KB instead of 3.5 to 5.</summary>
internal sealed class Rest
{
    internal const int Quiet = 500; // ms
    private const long Worth = 1 << 20; // bytes allocated since the last collection

    private long _allocated;
    private long _collected; // of _allocated
    private long _quietSince;

    internal bool IsDue => _allocated - _collected > Worth + (GC.GetTotalMemory(false) / 4);

    /// <summary>Called again and again with whether anything has happened since the last time.</summary>
    internal void Look(bool isQuiet, long now)
    {
        long allocated = GC.GetTotalAllocatedBytes();
        if (!isQuiet || allocated != _allocated)
        {
            (_allocated, _quietSince) = (allocated, now);
        }
        else if (now - _quietSince >= Quiet && IsDue)
        {
            GC.Collect(GC.MaxGeneration, GCCollectionMode.Aggressive, blocking: true, compacting: true);
            _collected = _allocated = GC.GetTotalAllocatedBytes();
        }
    }
}

internal static class EventLoop
{
    /// <summary>Must come before the first socket: the runtime reads these once. Inline completions make one epoll
    /// loop a processor with no hop to the thread pool; that is why nothing may block in a continuation (rule 6).</summary>
    internal static void Configure(int threads)
    {
        Environment.SetEnvironmentVariable("DOTNET_SYSTEM_NET_SOCKETS_INLINE_COMPLETIONS", "1");
        if (threads > 0)
        {
            Environment.SetEnvironmentVariable("DOTNET_SYSTEM_NET_SOCKETS_THREAD_COUNT", Text.Of(threads));
        }
    }

    /// <summary>To be awaited by one who has worked for long: goes on after what has come for others.</summary>
    internal static ValueTask<int> TurnAsync() => Bell.OfLoop() is { } bell ? new ValueTask<int>(bell, 0) : YieldAsync();

    private static async ValueTask<int> YieldAsync()
    {
        await Task.Yield();
        return 0;
    }
}

/// <summary>A socket pair in which an event loop rings itself, so that those who await their turn go on by themselves when the
/// loop has looked at all other sockets. Task.Yield would move them to the thread pool, which competes with the loop for its
/// processor: a fifth more of its time per byte copied.</summary>
internal sealed class Bell : IValueTaskSource<int>
{
    [ThreadStatic]
    private static Bell? _ofLoop;

    private static int _isHanging; // one of them, to the loop that will be its own

    private readonly Socket _ear; // owned
    private readonly Socket _rope; // owned
    private readonly byte[] _sound = new byte[1];
    private readonly Queue<Action<object?>> _waiting = new();
    private readonly Queue<object?> _states = new(); // of those who wait, in their order
    private bool _isRung;

    private Bell(Socket ear, Socket rope) => (_ear, _rope) = (ear, rope);

    /// <summary>The one of the event loop whose thread this is. Null on other threads, and while there is none: which loop gets
    /// a new one is the runtime's choice (they take turns), so that one is hung up whenever it was missed.</summary>
    internal static Bell? OfLoop()
    {
        if (_ofLoop is null && Libc.IsThere && !Thread.CurrentThread.IsThreadPoolThread
            && Interlocked.Exchange(ref _isHanging, 1) == 0)
        {
            HangUp();
        }

        return _ofLoop;
    }

    private static void HangUp()
    {
        Span<int> ends = stackalloc int[2];
        if (Libc.OpenSocketPair(Libc.UnixFamily, Libc.StreamSocket | Libc.CloseOnExecSocket, 0, ref MemoryMarshal.GetReference(ends)) == 0)
        {
            Bell bell = new(Own(ends[0]), Own(ends[1]));
            _ = bell.RunAsync();
            bell.Ring(); // now that it waits: it goes on in its loop
        }
        else
        {
            _isHanging = 0; // out of descriptors just now
        }

        static Socket Own(int descriptor) => new(new SafeSocketHandle(descriptor, ownsHandle: true));
    }

    private async Task RunAsync()
    {
        await _ear.ReceiveAsync(_sound.AsMemory(), SocketFlags.None);
        _isHanging = 0;
        if (_ofLoop is not null || Thread.CurrentThread.IsThreadPoolThread)
        {
            _ear.Dispose();
            _rope.Dispose();
            return;
        }

        _ofLoop = this;
        while (true)
        {
            _isRung = false;
            ValueTask<int> ringing = _ear.ReceiveAsync(_sound.AsMemory(), SocketFlags.None); // before they ring: so it waits
            for (int count = _waiting.Count; count > 0; count--)
            {
                _waiting.Dequeue()(_states.Dequeue());
            }

            await ringing;
        }
    }

    private void Ring()
    {
        _isRung = true;
        _rope.Send(_sound);
    }

    public int GetResult(short token) => 0;

    public ValueTaskSourceStatus GetStatus(short token) => ValueTaskSourceStatus.Pending;

    public void OnCompleted(Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags)
    {
        _waiting.Enqueue(continuation);
        _states.Enqueue(state);
        if (!_isRung)
        {
            Ring();
        }
    }
}

/// <summary>stdout and stderr. A native executable calls write(2): System.Console would bring the terminal database
/// and the encodings along (0.2 MB).</summary>
internal static class StandardStream
{
    internal const int Output = 1;
    internal const int Error = 2;

    /// <summary>False when nobody reads it, or its disk is full.</summary>
    internal static bool TryWrite(int stream, ReadOnlySpan<byte> bytes)
    {
        if (!OperatingSystem.IsLinux() || RuntimeFeature.IsDynamicCodeSupported)
        {
            return TryWriteConsole(stream, bytes);
        }

        // Started with it closed, the number belongs to a descriptor of the runtime's own, which is close-on-exec.
        if ((Libc.Fcntl(stream, Libc.GetDescriptorFlags) & Libc.CloseOnExec) != 0)
        {
            return false;
        }

        while (bytes.Length > 0)
        {
            nint written = Libc.Write(stream, in MemoryMarshal.GetReference(bytes), (nuint)bytes.Length);
            int error = written > 0 ? 0 : Marshal.GetLastPInvokeError();
            if (error == Libc.Eagain)
            {
                Libc.PollDescriptor poll = new() { Descriptor = stream, Events = Libc.PollOut };
                _ = Libc.Poll(ref poll, 1, Timeout.Infinite); // somebody else has made it non-blocking
            }
            else if (error != 0 && error != Libc.Eintr)
            {
                return false;
            }

            bytes = bytes[(int)Math.Max(written, 0)..];
        }

        return true;
    }

    private static bool TryWriteConsole(int stream, ReadOnlySpan<byte> bytes)
    {
        try
        {
            using Stream console = stream == Output ? Console.OpenStandardOutput() : Console.OpenStandardError();
            console.Write(bytes);
            return true;
        }
        catch (IOException)
        {
            return false;
        }
    }
}

internal static class SocketErrors
{
    /// <summary>EMFILE, ENFILE, ENOBUFS, ENOMEM.</summary>
    internal static bool IsExhausted(SocketError error) =>
        error is SocketError.TooManyOpenSockets or SocketError.NoBufferSpaceAvailable;
}

internal static class SocketOptions
{
    private const int ProbeCount = 3;

    /// <summary>Every message at once, and urgent bytes in their place among the others. What a listener has, the
    /// sockets that it accepts have as well on Linux.</summary>
    internal static void Relay(Socket socket)
    {
        try
        {
            socket.NoDelay = true;
            socket.SetSocketOption(SocketOptionLevel.Socket, SocketOptionName.OutOfBandInline, true);
        }
        catch (SocketException)
        {
            // it was reset before it was ours (macOS); the pump finds out
        }
    }

    internal static void Keepalive(Socket? socket, TimeSpan time)
    {
        if (socket is null || time <= TimeSpan.Zero || socket.AddressFamily == AddressFamily.Unix)
        {
            return;
        }

        int seconds = Math.Max(1, (int)Math.Min(time.TotalSeconds, 32767)); // the kernel's limit
        socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveTime, seconds);
        socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveInterval, Math.Max(1, seconds / 4));
        socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveRetryCount, ProbeCount);
        socket.SetSocketOption(SocketOptionLevel.Socket, SocketOptionName.KeepAlive, true);
    }

    /// <summary>Binds to a local address and leaves the choice of the port to connect(), so that a port can serve
    /// several destinations at once (Linux ip(7), IP_BIND_ADDRESS_NO_PORT).</summary>
    internal static void BindSource(Socket socket, IPAddress? source)
    {
        const int SolIp = 0;
        const int IpBindAddressNoPort = 24;
        if (source is not null)
        {
            if (OperatingSystem.IsLinux())
            {
                socket.SetRawSocketOption(SolIp, IpBindAddressNoPort, [1, 0, 0, 0]);
            }

            socket.Bind(new IPEndPoint(source, 0));
        }
    }

    /// <summary>An error waits to be received, a reset above all. Poll's SelectError would also find urgent data.</summary>
    internal static bool HasFailed(Socket socket)
    {
        Libc.PollDescriptor poll = new() { Descriptor = (int)socket.Handle };
        return Libc.IsThere && Libc.Poll(ref poll, 1, 0) > 0 && (poll.Returned & Libc.PollError) != 0;
    }

    /// <summary>It was reset, or has ended without a byte that was not received yet.</summary>
    internal static bool HasLeft(Socket socket)
    {
        try
        {
            return HasFailed(socket) || (socket.Poll(0, SelectMode.SelectRead) && socket.Available == 0);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            return true;
        }
    }

    /// <summary>Bytes in the send queue that the peer has not acknowledged; 0 where the system does not tell.</summary>
    internal static int Unsent(Socket? socket)
    {
        const int SiocOutq = 0x5411; // Linux tcp(7)
        int unsent = 0;
        return socket is not null && Libc.IsThere && Libc.Ioctl((int)socket.Handle, SiocOutq, ref unsent) == 0 ? unsent : 0;
    }
}

internal static class Descriptors
{
    private const int First = 3; // SD_LISTEN_FDS_START of sd_listen_fds(3)

    /// <summary>How many this process may have open.</summary>
    internal static long Limit =>
        Libc.IsThere && Libc.GetLimit(Libc.RlimitNofile, out Libc.Limit limit) == 0 ? (long)limit.Soft : 0;

    /// <summary>The soft limit is for programs that select(2); the hard one is what the administrator allows.</summary>
    internal static void RaiseLimit()
    {
        if (Libc.IsThere && Libc.GetLimit(Libc.RlimitNofile, out Libc.Limit limit) == 0 && limit.Soft < limit.Hard)
        {
            limit.Soft = limit.Hard;
            _ = Libc.SetLimit(Libc.RlimitNofile, in limit); // best effort
        }
    }

    /// <summary>fd:N is that descriptor; fd:NAME all of that name, as systemd hands them over (sd_listen_fds(3)).</summary>
    /// <exception cref="IOException">there is none of that name</exception>
    internal static int[] Inherited(string name)
    {
        if (int.TryParse(name, NumberStyles.None, CultureInfo.InvariantCulture, out int descriptor))
        {
            return [descriptor];
        }

        bool isOurs = Environment.GetEnvironmentVariable("LISTEN_PID") == Text.Of(Environment.ProcessId);
        string[] names = isOurs ? (Environment.GetEnvironmentVariable("LISTEN_FDNAMES") ?? "").Split(':') : [];
        List<int> found = [];
        for (int i = 0; i < names.Length; i++)
        {
            if (names[i] == name)
            {
                found.Add(First + i);
            }
        }

        return found.Count > 0 ? [.. found] : throw new IOException(isOurs
            ? $"no descriptor of that name was passed, only '{string.Join("', '", names)}'"
            : "no descriptors were passed (LISTEN_PID, LISTEN_FDNAMES); is this started by socket activation?");
    }
}

/// <summary>Files that others wait for: they appear whole, or not at all.</summary>
internal static class WholeFile
{
    /// <summary>True when it is ours to remove: a device such as /dev/stdout is written into, not replaced.</summary>
    internal static bool Write(string path, string text)
    {
        bool isDevice = path.StartsWith("/dev/", StringComparison.Ordinal)
            && !path.StartsWith("/dev/shm/", StringComparison.Ordinal);
        string temporary = isDevice ? path : $"{path}.{Environment.ProcessId}.tmp";
        try
        {
            File.WriteAllBytes(temporary, Encoding.UTF8.GetBytes(text));
            if (!isDevice)
            {
                File.Move(temporary, path, overwrite: true);
            }

            return !isDevice;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new IOException($"cannot write {path}: {Text.Reason(e)}");
        }
    }

    /// <summary>open(2) on a socket fails with ENXIO (Linux) or EOPNOTSUPP (macOS).</summary>
    internal static bool IsSocket(string path)
    {
        const int Enxio = 6;
        const int MacNotSupported = 102;
        try
        {
            File.OpenHandle(path, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite).Dispose();
            return false;
        }
        catch (IOException e)
        {
            return e.HResult == (OperatingSystem.IsMacOS() ? MacNotSupported : Enxio);
        }
        catch (UnauthorizedAccessException)
        {
            return false;
        }
    }

    internal static void Remove(string path)
    {
        try
        {
            File.Delete(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // it has served its purpose; whoever made it unremovable knows why
        }
    }
}

/// <summary>One pipe a thread, through which splice(2) moves bytes from socket to socket without copying them. Whoever
/// fills it empties it before the thread does anything else; one that was left with bytes in it, because something threw
/// in between, is never used again: they belong to somebody else's connection.</summary>
internal sealed class Pipe
{
    internal const int NothingYet = -1;

    private const int NonBlock = 0x800;
    private const int CloseOnExec = 0x80000;
    private const int SetSize = 1031; // F_SETPIPE_SZ
    private const int Size = 256 << 10; // the splices of the default buffer; a kernel that refuses leaves 64k
    private const uint MoveNonBlock = 3; // SPLICE_F_MOVE | SPLICE_F_NONBLOCK

    [ThreadStatic]
    private static Pipe? _ofThread;

    private static bool _isRefused; // for good: a socket that cannot be spliced, a system or a sandbox without splice

    private readonly SafeFileHandle _out; // owned; both are closed when the pipe is, or finalized with their thread
    private readonly SafeFileHandle _in;
    private int _length; // bytes in it

    private Pipe(int readEnd, int writeEnd)
    {
        _out = new SafeFileHandle(readEnd, ownsHandle: true);
        _in = new SafeFileHandle(writeEnd, ownsHandle: true);
        _ = Libc.Fcntl(writeEnd, SetSize, Size);
    }

    internal static bool IsUsable => Libc.IsThere && !_isRefused;

    /// <summary>The thread's own, empty; null where there is none: not on this system, or out of descriptors just now.</summary>
    internal static Pipe? OfThread()
    {
        if (_ofThread is { _length: > 0 } stale)
        {
            stale._out.Dispose();
            stale._in.Dispose();
            _ofThread = null;
        }

        return IsUsable ? _ofThread ??= Open() : null;
    }

    /// <summary>Takes up to <paramref name="most"/> bytes from <paramref name="source"/>; 0 at its end, but also where it
    /// stops at urgent data.</summary>
    /// <exception cref="SocketException">the source has failed</exception>
    internal int Fill(Socket source, int most)
    {
        nint moved = Libc.Splice(source.SafeHandle, 0, _in, 0, (nuint)most, MoveNonBlock);
        if (moved >= 0)
        {
            return _length = (int)moved;
        }

        int error = Marshal.GetLastPInvokeError();
        if (Libc.IsConnectionLost(error))
        {
            throw new SocketException((int)SocketError.ConnectionReset); // splice has taken the error off the socket
        }

        _isRefused |= error is not (Libc.Eagain or Libc.Eintr);
        return NothingYet;
    }

    /// <summary>Gives what is in it to <paramref name="target"/>; returns how much that did not take.</summary>
    internal int Empty(Socket target)
    {
        while (_length > 0)
        {
            nint moved = Libc.Splice(_out, 0, target.SafeHandle, 0, (nuint)_length, MoveNonBlock);
            if (moved <= 0)
            {
                break; // it is full, or gone
            }

            _length -= (int)moved;
        }

        return _length;
    }

    /// <summary>Takes back all that is in it.</summary>
    internal void Read(Span<byte> bytes)
    {
        while (_length > 0)
        {
            nint read = Libc.Read(_out, ref MemoryMarshal.GetReference(bytes), (nuint)_length);
            read = Math.Max(read, 0); // it is all there: a read can only be interrupted
            bytes = bytes[(int)read..];
            _length -= (int)read;
        }
    }

    private static Pipe? Open()
    {
        Span<int> ends = stackalloc int[2];
        return Libc.OpenPipe(ref MemoryMarshal.GetReference(ends), NonBlock | CloseOnExec) == 0
            ? new Pipe(ends[0], ends[1]) : null;
    }
}

/// <summary>A child process. Its stdin and stdout are one socket of ours, its stderr another: what the event loops serve are
/// Sockets, and no pipe is one. (So it cannot open /dev/stdout anew, which is for files.) It leads a process group, which ends
/// with it.
/// <para>Who kills it reaps it, after that: until then its number is no other's. No thread and no descriptor waits for its end,
/// which is looked for when its output has ended: that comes a moment before.</para></summary>
internal sealed class Child
{
    private readonly int _id;
    private bool _isKilled;

    private Child(int id, Socket pipe, Socket errors) => (_id, Pipe, Errors) = (id, pipe, errors);

    internal Socket Pipe { get; } // owned; disposed by Kill
    internal Socket Errors { get; } // its reader disposes it

    /// <summary>Where the program is, as execvp(3) looks for it; null when there is none.</summary>
    internal static string? Find(string name)
    {
        string[] folders = name.Contains('/', StringComparison.Ordinal) ? [""]
            : (Environment.GetEnvironmentVariable("PATH") ?? "/usr/local/bin:/usr/bin:/bin").Split(':');
        return Array.Find(Array.ConvertAll(folders, folder => Path.Combine(folder, name)), File.Exists);
    }

    /// <summary>Before the first: descriptors that we were started with are not for children (those that the runtime opens are
    /// close-on-exec), and where SIGCHLD was ignored, the kernel would keep no exit status.</summary>
    internal static void Prepare()
    {
        for (int i = StandardStream.Error + 1; i < 1024; i++)
        {
            _ = Libc.Fcntl(i, Libc.SetDescriptorFlags, Libc.CloseOnExec);
        }

        _ = Libc.Signal(Libc.SigChild, 0); // SIG_DFL
    }

    /// <summary>Blocks until its program is loaded; null when it is not. Our environment is added to its own.</summary>
    internal static Child? Start(string path, string[] words, List<string?> environment, out int error)
    {
        foreach (DictionaryEntry ours in Environment.GetEnvironmentVariables())
        {
            string name = $"{ours.Key}=";
            if (!name.StartsWith("DOTNET_SYSTEM_NET_SOCKETS_", StringComparison.Ordinal) // which EventLoop has set
                && !environment.Exists(own => own!.StartsWith(name, StringComparison.Ordinal)))
            {
                environment.Add(name + ours.Value);
            }
        }

        const int Type = Libc.StreamSocket | Libc.CloseOnExecSocket;
        Span<int> ends = [-1, -1, -1, -1]; // ours and the child's, for stdin and stdout, then for stderr
        int id = 0;
        error = Libc.OpenSocketPair(Libc.UnixFamily, Type, 0, ref ends[0]) != 0
            || Libc.OpenSocketPair(Libc.UnixFamily, Type, 0, ref ends[2]) != 0 ? Libc.Emfile
            : Libc.Spawn(out id, path, ends[1], ends[3], [.. words, null], [.. environment, null]);
        _ = Libc.Close(ends[1]);
        _ = Libc.Close(ends[3]);
        if (error == 0)
        {
            return new Child(id, Own(ends[0]), Own(ends[2]));
        }

        _ = Libc.Close(ends[0]);
        _ = Libc.Close(ends[2]);
        return null;

        static Socket Own(int descriptor) => new(new SafeSocketHandle(descriptor, ownsHandle: true));
    }

    /// <summary>0 at the end, and where it has ended without having read all (a reset) or is killed.</summary>
    internal static async ValueTask<int> TryAsync(Func<ValueTask<int>> action)
    {
        try
        {
            return await action();
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            return 0;
        }
    }

    internal static ValueTask<int> ReadAsync(Socket socket, Memory<byte> bytes) =>
        TryAsync(() => socket.ReceiveAsync(bytes, SocketFlags.None));

    internal ValueTask<int> CloseInputAsync() => TryAsync(() =>
    {
        Pipe.Shutdown(SocketShutdown.Send);
        return default;
    });

    /// <summary>Its output has ended: how it ends itself, in words; null is well.</summary>
    internal async Task<string?> EndAsync()
    {
        const int Look = Libc.WaitExited | Libc.WaitNoHang | Libc.WaitNoReap;
        Libc.ChildStatus status = default;
        for (int pause = 1; !Volatile.Read(ref _isKilled)
            && Libc.Wait(Libc.WaitProcess, _id, ref status, Look) == 0 && status.Id == 0; pause++)
        {
            await Task.Delay(pause);
        }

        Kill(); // what is left of its group
        return status.Code == 0 ? "killed" : status.Code != Libc.ChildExited ? $"killed by signal {Text.Of(status.Status)}"
            : status.Status == 0 ? null : $"exited with status {Text.Of(status.Status)}";
    }

    internal void Kill()
    {
        if (!Interlocked.Exchange(ref _isKilled, true))
        {
            _ = Libc.Kill(-_id, Libc.SigKill);
            _ = ReapAsync();
        }

        Pipe.Dispose();
    }

    /// <summary>All of the group that is ours: more than itself where we are process 1.</summary>
    private async Task ReapAsync()
    {
        Libc.ChildStatus status = default;
        for (int pause = 1; Libc.Wait(Libc.WaitGroup, _id, ref status, Libc.WaitExited | Libc.WaitNoHang) == 0; pause++)
        {
            await (status.Id == 0 ? Task.Delay(pause) : Task.CompletedTask);
            status = default;
        }
    }
}

/// <summary>Calls that the BCL does not have. A static executable has no dlopen: they are linked in
/// (DirectPInvoke in TcpProxy.csproj).</summary>
internal static partial class Libc
{
    internal const int RlimitNofile = 7;
    internal const int Eintr = 4;
    internal const int Eagain = 11;
    internal const int GetDescriptorFlags = 1;
    internal const int SetDescriptorFlags = 2;
    internal const int CloseOnExec = 1;
    internal const short PollOut = 4;
    internal const short PollError = 8;
    internal const int UnixFamily = 1;
    internal const int StreamSocket = 1;
    internal const int CloseOnExecSocket = 0x80000;
    internal const int Emfile = 24;
    internal const int SigKill = 9;
    internal const int SigChild = 17;
    internal const int WaitProcess = 1; // P_PID
    internal const int WaitGroup = 2; // P_PGID
    internal const int WaitNoHang = 1;
    internal const int WaitExited = 4;
    internal const int WaitNoReap = 0x1000000; // WNOWAIT
    internal const int ChildExited = 1; // CLD_EXITED; the others are CLD_KILLED and CLD_DUMPED

    /// <summary>The numbers above and below are Linux's, on x64 and arm64. TCPPROXY_PORTABLE=1 is for the tests.</summary>
    internal static bool IsThere { get; } =
        OperatingSystem.IsLinux() && Environment.GetEnvironmentVariable("TCPPROXY_PORTABLE") != "1";

    /// <summary>EPIPE, ENETUNREACH, ECONNRESET, ENOTCONN, ETIMEDOUT, EHOSTUNREACH.</summary>
    internal static bool IsConnectionLost(int error) => error is 32 or 101 or 104 or 107 or 110 or 113;

    [StructLayout(LayoutKind.Sequential)]
    internal struct PollDescriptor
    {
        internal int Descriptor;
        internal short Events;
        internal short Returned;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct Limit
    {
        internal ulong Soft;
        internal ulong Hard;
    }

    /// <summary>siginfo_t of a child; 0 is none.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 128)]
    internal struct ChildStatus
    {
        private readonly long _signal;
        internal long Code; // an int, and nothing behind it
        internal int Id;
        private readonly int _user;
        internal int Status; // or the signal
    }

    [LibraryImport("libc", EntryPoint = "getrlimit")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial int GetLimit(int resource, out Limit limit);

    [LibraryImport("libc", EntryPoint = "setrlimit")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial int SetLimit(int resource, in Limit limit);

    [LibraryImport("libc", EntryPoint = "write", SetLastError = true)]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial nint Write(int descriptor, in byte bytes, nuint count);

    [LibraryImport("libc", EntryPoint = "poll")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial int Poll(ref PollDescriptor descriptor, nuint count, int timeout);

    [LibraryImport("libc", EntryPoint = "fcntl")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial int Fcntl(int descriptor, int command, nint argument = 0);

    [LibraryImport("libc", EntryPoint = "socketpair")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial int OpenSocketPair(int family, int type, int protocol, ref int ends);

    [LibraryImport("libc", EntryPoint = "pipe2")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial int OpenPipe(ref int ends, int flags);

    [LibraryImport("libc", EntryPoint = "splice", SetLastError = true)]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial nint Splice(
        SafeHandle from, nint fromOffset, SafeHandle to, nint toOffset, nuint length, uint flags);

    [LibraryImport("libc", EntryPoint = "read")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial nint Read(SafeHandle descriptor, ref byte bytes, nuint count);

    [LibraryImport("libc", EntryPoint = "ioctl")]
    [DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]
    internal static partial int Ioctl(int descriptor, nuint request, ref int value);

    /// <summary>In a process group of its own, with all signals at their defaults (SIGPIPE is ignored here) and none blocked. The
    /// lists end with null. Returns the error number; 0 is none.</summary>
    internal static int Spawn(out int id, string path, int stdio, int stderr, string?[] words, string?[] environment)
    {
        Span<long> attributes = stackalloc long[64]; // posix_spawnattr_t of glibc and musl: flags, group, defaults, mask ...
        attributes.Clear();
        attributes[0] = 2 | 4 | 8; // POSIX_SPAWN_SETPGROUP, SETSIGDEF, SETSIGMASK
        attributes[1..17].Fill(-1); // every signal
        Span<long> actions = stackalloc long[32]; // posix_spawn_file_actions_t, as its init leaves it
        actions.Clear();
        int error = Duplicate(ref actions[0], stdio, 0) | Duplicate(ref actions[0], stdio, 1)
            | Duplicate(ref actions[0], stderr, 2);
        id = 0;
        error = error != 0 ? error : Spawn(out id, path, ref actions[0], ref attributes[0], words, environment);
        _ = EndActions(ref actions[0]);
        return error;
    }

    [LibraryImport("libc", EntryPoint = "posix_spawn", StringMarshalling = StringMarshalling.Utf8)]
    private static partial int Spawn(
        out int id, string path, ref long actions, ref long attributes, string?[] words, string?[] environment);

    [LibraryImport("libc", EntryPoint = "posix_spawn_file_actions_adddup2")]
    private static partial int Duplicate(ref long actions, int descriptor, int copy);

    [LibraryImport("libc", EntryPoint = "posix_spawn_file_actions_destroy")]
    private static partial int EndActions(ref long actions);

    [LibraryImport("libc", EntryPoint = "close")]
    internal static partial int Close(int descriptor);

    [LibraryImport("libc", EntryPoint = "kill")]
    internal static partial int Kill(int id, int signal);

    [LibraryImport("libc", EntryPoint = "signal")]
    internal static partial nint Signal(int signal, nint handler);

    [LibraryImport("libc", EntryPoint = "waitid")]
    internal static partial int Wait(int kind, int id, ref ChildStatus status, int options);
}

internal enum AddressKind
{
    Tcp,
    Loopback, // a bare port
    Unix,
    Descriptor,
    Echo,
    Discard,
}

/// <summary>Ports P1 to P2 at one host.</summary>
internal abstract class Address(string text, AddressKind kind, string host, int port, int lastPort)
{
    internal const int HighestPort = 65535;

    internal static int LongestPath => OperatingSystem.IsMacOS() ? 103 : 107; // bytes: sun_path of unix(7), without its NUL

    internal string Text { get; } = text; // as it was written
    internal AddressKind Kind { get; } = kind;
    internal string Host { get; } = host; // or the path, or the descriptor's number or name; "" = all interfaces
    internal int PortCount => lastPort - port + 1;

    public override string ToString() => Text;

    /// <summary>The port at a place in the range; a single port stands for all.</summary>
    internal int PortAt(int index) => PortCount == 1 ? port : port + index;

    /// <summary>HOST:PORT, [v6]:PORT or HOST:P1-P2 to its parts.</summary>
    /// <exception cref="FormatException">it is none</exception>
    protected static (string Host, int Port, int LastPort) Split(string text, bool isListen)
    {
        int colon = text.LastIndexOf(':');
        if (colon < 0)
        {
            throw new FormatException($"'{text}' has no port; an address is HOST:PORT");
        }

        string host = text[..colon];
        if (host is ['[', .., ']'])
        {
            host = host[1..^1];
            if (!IPAddress.TryParse(host, out IPAddress? v6) || v6.AddressFamily != AddressFamily.InterNetworkV6)
            {
                throw new FormatException($"'{host}' is not an IPv6 address");
            }
        }
        else if (host.Contains(':', StringComparison.Ordinal))
        {
            throw new FormatException(IPAddress.TryParse(text, out _)
                ? $"'{text}' has no port, or no brackets; an IPv6 address is written '[{text}]:PORT'"
                : $"'{text}' is not an address; an IPv6 address is written '[::1]:PORT'");
        }
        else if (host.Length > 0 && !(isListen && host == "*"))
        {
            CheckHost(host);
        }

        (int first, int last) = Ports(text[(colon + 1)..], text, isListen);
        return (host == "*" ? "" : host, first, last);
    }

    protected static (int First, int Last) Ports(string ports, string text, bool isListen)
    {
        int dash = ports.IndexOf('-', StringComparison.Ordinal);
        int first = Port(dash < 0 ? ports : ports[..dash]);
        int last = dash < 0 ? first : Port(ports[(dash + 1)..]);
        return last >= first && (first > 0 || last == 0) ? (first, last)
            : throw new FormatException($"'{text}': the range {ports} does not go upward from a port above 0");

        int Port(string digits) =>
            !TcpProxy.Text.IsDigits(digits) || digits.Length > 5
                ? throw new FormatException(
                    digits.Length == 0 ? $"'{text}' has no port" : $"'{text}': '{digits}' is not a port")
            : int.Parse(digits, CultureInfo.InvariantCulture) is int port && port > HighestPort
                ? throw new FormatException($"'{text}': port {port} is above {HighestPort}")
            : port == 0 && !isListen ? throw new FormatException($"'{text}': nothing can be reached at port 0")
            : port;
    }

    private static void CheckHost(string host)
    {
        const int Longest = 253; // characters: RFC 1035, 2.3.4, as text
        if (host.Length > Longest)
        {
            throw new FormatException($"a host name of {host.Length} characters; it has at most {Longest}");
        }

        foreach (char c in host)
        {
            if (!char.IsLetterOrDigit(c) && c is not ('.' or '-' or '_'))
            {
                throw new FormatException($"'{host}' is not a host name or IP address");
            }
        }

        if (host.Contains("..", StringComparison.Ordinal))
        {
            throw new FormatException($"'{host}' is not a host name: it has two dots in a row");
        }

        if (TcpProxy.Text.IsOf(host, '.') && (!IPAddress.TryParse(host, out _) || host.Split('.').Length != 4))
        {
            throw new FormatException($"'{host}' is not an IPv4 address");
        }
    }

    /// <summary>The rest of <paramref name="text"/> after a prefix such as unix: or null.</summary>
    protected static string? After(string prefix, string text, string what) =>
        !text.StartsWith(prefix, StringComparison.Ordinal) ? null
        : text.Length > prefix.Length ? text[prefix.Length..]
        : throw new FormatException($"'{text}' has no {what}");

    protected static string CheckPath(string path)
    {
        return Encoding.UTF8.GetByteCount(TcpProxy.Text.FileName(path)) <= LongestPath ? path
            : throw new FormatException($"'{path}' is longer than the {LongestPath} bytes of a unix socket's path");
    }

    protected static bool IsPorts(string text) =>
        text.Length > 0 && char.IsAsciiDigit(text[0]) && TcpProxy.Text.IsOf(text, '-');
}

internal sealed class ListenAddress : Address
{
    private ListenAddress(string text, AddressKind kind, string host, int port = 0, int lastPort = 0)
        : base(text, kind, host, port, lastPort)
    {
    }

    /// <exception cref="FormatException">it is no listen address</exception>
    internal static ListenAddress Parse(string text)
    {
        if (After("unix:", text, "path") is { } path)
        {
            return new(text, AddressKind.Unix, CheckPath(path));
        }

        if (After("fd:", text, "number or name") is { } descriptor)
        {
            return new(text, AddressKind.Descriptor, descriptor);
        }

        if (IsPorts(text))
        {
            (int first, int last) = Ports(text, text, isListen: true);
            return new(text, AddressKind.Loopback, "", first, last);
        }

        (string host, int port, int lastPort) = Split(text, isListen: true);
        return new(text, host == "localhost" ? AddressKind.Loopback : AddressKind.Tcp, host, port, lastPort);
    }
}

internal sealed class UpstreamAddress : Address
{
    private UpstreamAddress(string text, AddressKind kind, string host, int port = 0, int lastPort = 0)
        : base(text, kind, host, port, lastPort)
    {
    }

    /// <exception cref="FormatException">it is no upstream address</exception>
    internal static UpstreamAddress Parse(string text)
    {
        if (text is "echo" or "discard")
        {
            return new(text, text == "echo" ? AddressKind.Echo : AddressKind.Discard, "");
        }

        if (After("unix:", text, "path") is { } path)
        {
            return new(text, AddressKind.Unix, CheckPath(path));
        }

        if (IsPorts(text))
        {
            (int first, int last) = Ports(text, text, isListen: false);
            return new(text, AddressKind.Tcp, "localhost", first, last);
        }

        if (TcpProxy.Text.Nearest(text, "echo", "discard") is { } near && !text.Contains(':', StringComparison.Ordinal))
        {
            throw new FormatException($"'{text}' has no port; an address is HOST:PORT; did you mean '{near}'?");
        }

        (string host, int port, int lastPort) = Split(text, isListen: false);
        return host.Length > 0 ? new(text, AddressKind.Tcp, host, port, lastPort)
            : throw new FormatException($"'{text}' has no host; for this machine write '{text[1..]}'");
    }
}

/// <summary>Networks as people write them: 10.0.0.0/8, 2001:db8::/32, or one address. IPv4 within IPv6 is IPv4.</summary>
internal static class Network
{
    private const int Mapped = 96; // bits in front of the IPv4 address in ::ffff:0:0/96 (RFC 4291, 2.5.5.2)

    /// <exception cref="FormatException">it is no network</exception>
    internal static IPNetwork Parse(string text)
    {
        int slash = text.IndexOf('/', StringComparison.Ordinal);
        string host = slash < 0 ? text : text[..slash];
        if (!IPAddress.TryParse(host, out IPAddress? address)
            || (!host.Contains(':', StringComparison.Ordinal) && host.Split('.').Length != 4))
        {
            throw new FormatException($"'{text}' is not a network; write 10.0.0.0/8, 2001:db8::/32 or an address");
        }

        int bits = address.AddressFamily == AddressFamily.InterNetwork ? 32 : 128;
        int prefix = slash < 0 ? bits : Units.ParseCount(text[(slash + 1)..], most: bits);
        if (address.IsIPv4MappedToIPv6 && prefix >= Mapped)
        {
            (address, prefix) = (address.MapToIPv4(), prefix - Mapped);
        }

        IPNetwork network = new(address, prefix);
        return network.BaseAddress.Equals(address) ? network
            : throw new FormatException($"'{text}' has bits beyond its prefix; did you mean '{network}'?");
    }

    internal static bool Has(IPNetwork network, IPAddress address) =>
        network.Contains(address.IsIPv4MappedToIPv6 ? address.MapToIPv4() : address);
}

/// <summary>Times, sizes and counts as people write them. 0 and off are zero.</summary>
internal static class Units
{
    private static readonly string[] Suffixes = ["d", "h", "m", "s", "ms"];
    private static readonly long[] Milliseconds = [86_400_000, 3_600_000, 60_000, 1000, 1];

    private const long Longest = 49L * 86_400_000; // ms: what the runtime's timers can count

    /// <exception cref="FormatException">it is no time</exception>
    internal static TimeSpan ParseTime(string text)
    {
        int digits = 0;
        while (digits < text.Length && char.IsAsciiDigit(text[digits]))
        {
            digits++;
        }

        int unit = Array.IndexOf(Suffixes, digits == text.Length ? "s" : text[digits..]);
        if (text != "off" && (unit < 0 || digits == 0))
        {
            throw new FormatException($"'{text}' is not a time; write 500ms, 5s, 10m, 1h, 7d or off");
        }

        return text == "off" ? TimeSpan.Zero
            : long.TryParse(text.AsSpan(0, digits), out long value) && value <= Longest / Milliseconds[unit]
                ? TimeSpan.FromMilliseconds(value * Milliseconds[unit])
            : throw new FormatException($"'{text}' is too long; at most {Text(TimeSpan.FromMilliseconds(Longest))}, or off");
    }

    /// <summary>TIME [SECOND]</summary>
    /// <exception cref="FormatException">it is no time, or more than two</exception>
    internal static (TimeSpan First, TimeSpan Second) ParseTimes(string text)
    {
        int blank = text.IndexOf(' ', StringComparison.Ordinal);
        return blank < 0 ? (ParseTime(text), TimeSpan.Zero) : (ParseTime(text[..blank]), ParseTime(text[blank..].Trim()));
    }

    /// <summary>The shortest way to write a time.</summary>
    internal static string Text(TimeSpan time)
    {
        long milliseconds = (long)time.TotalMilliseconds;
        int unit = Array.FindIndex(Milliseconds, length => milliseconds % length == 0);
        return $"{milliseconds / Milliseconds[unit]}{Suffixes[unit]}";
    }

    /// <exception cref="FormatException">it is no size, or not between the bounds</exception>
    internal static long ParseSize(string text, long least = 0, long most = 1L << 60)
    {
        int shift = text.Length == 0 ? 0 : char.ToLowerInvariant(text[^1]) switch
        {
            'k' => 10,
            'm' => 20,
            'g' => 30,
            _ => 0,
        };
        string digits = shift == 0 ? text : text[..^1];
        if (text == "off")
        {
            digits = "0";
        }

        if (!long.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out long value))
        {
            throw new FormatException($"'{text}' is not a size; write 512, 64k, 10m or 1g"
                + (least == 0 ? ", or off" : ""));
        }

        return value <= most >> shift && value << shift >= least ? value << shift
            : throw new FormatException($"'{text}' is not between {Size(least)} and {Size(most)}");
    }

    /// <summary>Bytes a second.</summary>
    /// <exception cref="FormatException">it is no rate</exception>
    internal static long ParseRate(string text) =>
        text.EndsWith("/s", StringComparison.Ordinal) ? ParseSize(text[..^2], most: 1L << 40)
        : text is "0" or "off" ? 0 : throw new FormatException($"'{text}' is not a rate; write 512/s, 64k/s, 10m/s or off");

    /// <exception cref="FormatException">it is no count, or not between the bounds</exception>
    internal static int ParseCount(string text, int least = 0, int most = int.MaxValue)
    {
        if (!int.TryParse(text == "off" ? "0" : text, NumberStyles.None, CultureInfo.InvariantCulture, out int value))
        {
            throw new FormatException($"'{text}' is not a number");
        }

        return value >= least && value <= most ? value
            : throw new FormatException($"'{text}' is not between {least} and {most}");
    }

    private static string Size(long bytes) =>
        bytes >= 1 << 30 && bytes % (1 << 30) == 0 ? $"{bytes >> 30}g"
        : bytes >= 1 << 20 && bytes % (1 << 20) == 0 ? $"{bytes >> 20}m" : $"{bytes}";
}

internal static class Text
{
    internal static bool IsDigits(string text) => text.Length > 0 && text.AsSpan().IndexOfAnyExceptInRange('0', '9') < 0;

    /// <summary>Digits and <paramref name="mark"/>, nothing else.</summary>
    internal static bool IsOf(string text, char mark) => IsDigits(text.Replace($"{mark}", "", StringComparison.Ordinal));

    internal static string Of(long number) => number.ToString(CultureInfo.InvariantCulture);

    /// <summary>RFC 3339 with milliseconds. By hand: DateTime's own formatting brings the time zones along (0.2 MB).</summary>
    internal static string Of(DateTime utc)
    {
        Span<char> text = stackalloc char[24];
        "0000-00-00T00:00:00.000Z".CopyTo(text);
        Put(text[..4], utc.Year);
        Put(text[5..7], utc.Month);
        Put(text[8..10], utc.Day);
        Put(text[11..13], utc.Hour);
        Put(text[14..16], utc.Minute);
        Put(text[17..19], utc.Second);
        Put(text[20..23], utc.Millisecond);
        return new string(text);

        static void Put(Span<char> digits, int number)
        {
            for (int i = digits.Length - 1; i >= 0; i--, number /= 10)
            {
                digits[i] = (char)('0' + (number % 10));
            }
        }
    }

    /// <summary>An end point as people write it: IPv4 without the IPv6 around it, "-" for none.</summary>
    internal static string Of(EndPoint? endPoint) => endPoint switch
    {
        IPEndPoint ip => (ip.Address.IsIPv4MappedToIPv6 ? new IPEndPoint(ip.Address.MapToIPv4(), ip.Port) : ip).ToString(),
        UnixDomainSocketEndPoint unix => $"unix:{unix}",
        _ => "-",
    };

    internal static string Count(long number, string thing) => $"{Of(number)} {thing}{(number == 1 ? "" : "s")}";

    internal static string FileName(string text) => text.Length == 0 ? throw new FormatException("an empty file name")
        : text.Contains('\0', StringComparison.Ordinal) ? throw new FormatException("a file name has no NUL character") : text;

    /// <summary>What went wrong, as the operating system's users know it.</summary>
    internal static string Reason(Exception e) => e switch
    {
        SocketException { SocketErrorCode: SocketError.ConnectionRefused } => "connection refused",
        SocketException { SocketErrorCode: SocketError.ConnectionReset } => "connection reset",
        SocketException { SocketErrorCode: SocketError.AddressAlreadyInUse } => "address already in use",
        SocketException { SocketErrorCode: SocketError.AddressNotAvailable } => "address not available",
        SocketException { SocketErrorCode: SocketError.NetworkUnreachable } => "network unreachable",
        SocketException { SocketErrorCode: SocketError.HostUnreachable } => "host unreachable",
        SocketException { SocketErrorCode: SocketError.HostNotFound or SocketError.NoData } => "name not resolved",
        SocketException { SocketErrorCode: SocketError.TryAgain } => "name server does not answer",
        SocketException { SocketErrorCode: SocketError.AccessDenied } or UnauthorizedAccessException => "permission denied",
        FileNotFoundException or DirectoryNotFoundException => "no such file or directory",
        _ => e.Message.Length > 0 ? e.Message.TrimEnd('.') : e.GetType().Name,
    };

    /// <summary>The candidate that was probably meant, or null.</summary>
    internal static string? Nearest(string word, params string[] candidates)
    {
        string? nearest = null;
        int least = Math.Min(3, (word.Length + 2) / 3) + 1; // a third of its letters may be wrong
        foreach (string candidate in candidates)
        {
            bool isStart = word.Length >= 3 && candidate.StartsWith(word, StringComparison.OrdinalIgnoreCase);
            int distance = isStart ? 1 : Distance(word, candidate);
            if (distance < least)
            {
                (nearest, least) = (candidate, distance);
            }
        }

        return nearest;
    }

    /// <summary>Levenshtein's.</summary>
    private static int Distance(string a, string b)
    {
        if (Math.Abs(a.Length - b.Length) > 3)
        {
            return int.MaxValue; // also keeps a huge word from costing much
        }

        int[] row = new int[b.Length + 1];
        for (int j = 0; j <= b.Length; j++)
        {
            row[j] = j;
        }

        for (int i = 1; i <= a.Length; i++)
        {
            int diagonal = row[0];
            row[0] = i;
            for (int j = 1; j <= b.Length; j++)
            {
                int change = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
                diagonal = row[j];
                row[j] = Math.Min(change, Math.Min(row[j], row[j - 1]) + 1);
            }
        }

        return row[b.Length];
    }

    /// <summary>Which of <paramref name="words"/> it is.</summary>
    /// <exception cref="FormatException">it is none of them</exception>
    internal static int ParseWord(string word, string what, params string[] words)
    {
        int index = Array.IndexOf(words, word);
        return index >= 0 ? index : throw new FormatException($"unknown {what} '{word}'; "
            + (Nearest(word, words) is { } near ? $"did you mean '{near}'?" : $"it is one of {string.Join(", ", words)}"));
    }

    /// <summary>Text with the escapes \n \r \t \\ and \xNN, as bytes.</summary>
    /// <exception cref="FormatException">another escape</exception>
    internal static byte[] Unescape(string text)
    {
        List<byte> bytes = [];
        for (int i = 0; i < text.Length; i++)
        {
            int end = text.IndexOf('\\', i);
            end = end < 0 ? text.Length : end;
            bytes.AddRange(Encoding.UTF8.GetBytes(text[i..end]));
            i = end + 1;
            if (end < text.Length)
            {
                int plain = i < text.Length ? "nrt\\".IndexOf(text[i], StringComparison.Ordinal) : -1;
                bytes.Add(plain >= 0 ? "\n\r\t\\"u8[plain]
                    : i + 2 < text.Length && text[i] == 'x'
                        && byte.TryParse(text.AsSpan(i + 1, 2), NumberStyles.AllowHexSpecifier, null, out byte code) ? code
                    : throw new FormatException($"'{text}': a backslash stands before n, r, t, another backslash or xNN"));
                i += plain >= 0 ? 0 : 2;
            }
        }

        return [.. bytes];
    }

    /// <summary>Words as a shell splits them: at blanks, but not in quotes or after a backslash (one in single quotes).</summary>
    /// <exception cref="FormatException">something is not closed</exception>
    internal static string[] Words(string text)
    {
        List<string> words = [];
        StringBuilder? word = null; // null between words
        char quote = ' '; // none
        for (int i = 0; i < text.Length; i++)
        {
            if (quote == ' ' && char.IsWhiteSpace(text[i]))
            {
                words.AddRange(word is null ? [] : [word.ToString()]);
                word = null;
                continue;
            }

            word ??= new StringBuilder();
            if (text[i] == quote || (quote == ' ' && text[i] is '"' or '\''))
            {
                quote = quote == ' ' ? text[i] : ' ';
                continue;
            }

            i += text[i] == '\\' && quote != '\'' ? 1 : 0;
            word.Append(i < text.Length ? text[i] : throw new FormatException("nothing follows the last backslash"));
        }

        words.AddRange(word is null ? [] : [word.ToString()]);
        return quote == ' ' ? [.. words] : throw new FormatException($"a quote ({quote}) is not closed");
    }

    /// <summary>What came from outside, without anything that a terminal or a parser could take for more: JSON's
    /// escapes (RFC 8259, 7), which logfmt shares.</summary>
    internal static string Escape(string text)
    {
        if (text.AsSpan().IndexOfAnyInRange('\0', '\u001f') < 0 && text.AsSpan().IndexOfAnyInRange('\u007f', '\u009f') < 0
            && text.AsSpan().IndexOfAny('"', '\\') < 0)
        {
            return text;
        }

        StringBuilder escaped = new();
        foreach (char c in text)
        {
            _ = c switch
            {
                '"' or '\\' => escaped.Append('\\').Append(c),
                '\n' => escaped.Append("\\n"),
                '\r' => escaped.Append("\\r"),
                '\t' => escaped.Append("\\t"),
                < ' ' or (>= '\u007f' and <= '\u009f') =>
                    escaped.Append("\\u").Append(((int)c).ToString("x4", CultureInfo.InvariantCulture)),
                _ => escaped.Append(c),
            };
        }

        return escaped.ToString();
    }
}
