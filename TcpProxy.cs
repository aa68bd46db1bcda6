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
//            |                      (2) AccessRules, ConnectionLimit               |
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
//   (2) Admission says yes or no: may this client connect, and now? Is there room for one more connection, of the route, of
//       that address, at that rate? In a route that asks for it a PROXY header tells first who the client is, and a TLS
//       hello whom it wants.
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
//   not at all    a silent connection holds no buffer and no pipe: 2.9 KB of objects (HAProxy: 3.3), of which the runtime's
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
//   5  Nothing below calls back upward, but that a Pump tells its Bridge of its end, and a Bridge the Proxy: tasks that
//      waited for them instead would cost every silent connection 300 bytes.
//   6  Continuations run on the event loop's own threads, so nothing in them may block. What would block (name
//      look-ups, the log) has a thread of its own; timeouts are found by one sweep, not by a timer a connection.
//
// MAP                                  to enter a room:  grep -n "^// == " TcpProxy.cs
//
//    1 PROGRAM     Main, exit status, signals
//    2 OPTIONS     the one table; command line and file to settings; help
//    3 COMMANDS    of --control; the text of --install-service
//    4 PROXY       routes; ServeAsync is steps (2) to (5), RoutedBridge the others; start, reload, drain, stop
//    5 ACCEPTOR    bind every kind of address, accept loop, out of descriptors
//    6 ADMISSION   who may connect, and when; how many, how fast, of the route and of an address
//    7 UPSTREAMS   servers: choice, retry, queue, down and up
//    8 CONNECT     resolve names, dial addresses
//    9 BRIDGE      ref-counted owner of both sockets; timeouts
//   10 PUMP        one direction: receive, send; the buffer; byte rates
//   11 TAPS        what looks into a direction, or changes it
//   12 PREREAD     PROXY protocol in and out, TLS server name
//   13 OPERATE     the page of --stats, the socket of --control, sd_notify
//   14 OBSERVE     log lines, written off the data path; reasons; counters
//   15 PLATFORM    the sweep, addresses, units, text, libc
//
// A section names types of later sections only, never of earlier ones (Unit/MapTests.cs holds that true).

using System;
using System.Buffers;
using System.Buffers.Binary;
using System.Collections;
using System.Collections.Concurrent;
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
    /// <summary>For as long as the process lives: one more signal while it ends must not end it with another status.</summary>
    private static PosixSignalRegistration?[] _signals = [];

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
                Command.Explain => Print(settings.Explain!.Answer(settings)),
                Command.InstallService => Print(ServiceText.Of(settings, args)),
                Command.WaitFor => await UpstreamPool.WaitForAsync(settings.WaitFor!, settings.WaitTimeout) is { } failure
                    ? throw new IOException(failure) : ExitStatus.Done,
                Command.Control => Tell(settings.ControlPath, settings.ControlWords, settings.WaitTimeout),
                Command.ReloadDryRun => DryRun(settings),
                _ => await RunAsync(settings, args),
            };
        }
        catch (Exception e) when (e is FormatException or IOException)
        {
            string priority = StandardStream.IsJournal ? "<3>" : "";
            StandardStream.TryWrite(
                StandardStream.Error, Encoding.UTF8.GetBytes($"{priority}tcpproxy: error: {Text.Escape(e.Message)}\n"));
            return e is FormatException ? ExitStatus.Usage : ExitStatus.Failed;
        }
    }

    private static async Task<int> RunAsync(Settings settings, string[] args)
    {
        EventLoop.Configure(settings.Threads);
        Descriptors.RaiseLimit();
        Account? account = settings.User is { } user ? new Account(user) : null;
        account?.Prepare(); // before there are other threads
        Proxy proxy = new(settings, account, running => CommandLine.Parse(args, running))
        {
            Version = Help.Version,
            Answer = ControlCommand.Answer,
        };
        Signals.Prepare();
        _signals =
        [
            PosixSignalRegistration.Create(PosixSignal.SIGTERM, Heed),
            PosixSignalRegistration.Create(PosixSignal.SIGINT, Heed),
            PosixSignalRegistration.Create(PosixSignal.SIGHUP, Heed),
            Signals.OfUser(1, proxy.Log.Reopen),
            Signals.OfUser(2, proxy.TellState),
        ];
        return await proxy.RunAsync() ? ExitStatus.Done : ExitStatus.Failed;

        void Heed(PosixSignalContext context)
        {
            context.Cancel = true; // the runtime would end the process
            bool isWindows = OperatingSystem.IsWindows(); // there HUP is a console that closes, TERM a machine that shuts down
            if (context.Signal == PosixSignal.SIGHUP && !isWindows)
            {
                proxy.Reload(out _);
                return;
            }

            proxy.Stop();
            if (isWindows && context.Signal != PosixSignal.SIGINT)
            {
                Thread.Sleep(Timeout.Infinite); // the process would be ended when this returns: Main returns when it has drained
            }
        }
    }

    /// <summary>Only the running process knows what it runs with.</summary>
    private static int DryRun(Settings settings)
    {
        string path = settings.Control is { Kind: AddressKind.Unix } control ? control.Host : throw new IOException(
            "--reload-dry-run: the running process is asked by its --control unix:PATH, and there is none in this configuration");
        try
        {
            return Tell(path, "reload dry-run", settings.WaitTimeout);
        }
        catch (IOException e)
        {
            throw new IOException($"--reload-dry-run: no running process answers: {e.Message["--ctl: ".Length..]}");
        }
    }

    private static int Tell(string path, string command, TimeSpan patience)
    {
        (string answer, bool isError) = ControlClient.Ask(path, command, patience);
        return Print(answer) == ExitStatus.Done && !isError ? ExitStatus.Done : ExitStatus.Failed;
    }

    private static int Print(string text) =>
        StandardStream.TryWrite(StandardStream.Output, Encoding.UTF8.GetBytes(text)) ? ExitStatus.Done : ExitStatus.Failed;
}

// == 2  OPTIONS =====================================================================================================
// An option is one row of Option.Table. The parser, both helps, the configuration file and the README's reference
// (Unit/HelpTests.cs) are made from that row. Anything wrong in what was typed is a FormatException whose message
// is the line that the user reads: where, what was wrong, what was probably meant.

/// <summary>One option. An empty <paramref name="value"/> name makes it a flag; <paramref name="fallback"/> is
/// applied by the same code as a typed value, so the default that help shows is the one in force. The first
/// sentence of <paramref name="help"/> is the short help.</summary>
internal sealed class Option(
    string name, string value, string group, string fallback, Action<Settings, RouteSettings, string> apply, string help,
    Scope scope = Scope.Route, bool isList = false, char letter = '\0')
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

    /// <summary>Each that is typed adds to those before it; else the last holds.</summary>
    internal bool IsList { get; } = isList;

    internal static readonly Option[] Table =
    [
        new("listen", "ADDR", "route", "", (_, r, v) => r.Listen = ListenAddress.Parse(v),
            "Accept clients at ADDR; starts a route. The options that follow belong to it; those before the first --listen are "
            + "defaults for every route.", letter: 'l'),
        new("upstream", "ADDR", "route", "", (_, r, v) => r.Add(UpstreamSettings.Parse(v)),
            "Relay them to ADDR; of several, and of the addresses of a name, to the one that --balance picks. Settings may "
            + "follow: weight=N is its share (1; 0 to 256, 0 = no new connections), backup keeps it for when no other can take "
            + "one, max-connections=N bounds it (off), slow-start=TIME is how long its share grows when it is back after a "
            + "failure (10s), name=TEXT is what the log and --balance source call it "
            + "(as it is written).", isList: true, letter: 'u'),
        new("sni", "NAME[,NAME...]", "route", "", (_, r, v) => r.ServerNames = ServerName.ParseList(v),
            "The upstreams that follow serve the TLS clients that ask for NAME. *.example.com stands for all names below "
            + "example.com; an exact name wins over it, and a longer one over a shorter. Upstreams before any --sni serve all "
            + "others; without them, others are refused. TLS goes through as it is.", isList: true),
        new("name", "TEXT", "route", "",
            (_, r, v) => r.Name = v.Length > 0 ? v : throw new FormatException("a name has at least one character"),
            "Call the route TEXT in the log. Without it, it is called as its listen address is written."),

        new("balance", "POLICY", "balance", "leastconn",
            (_, r, v) => r.Pool.Policy = (Policy)Text.ParseWord(v, "policy", RouteSettings.Policies),
            "Pick servers by POLICY, in proportion to their weights. leastconn: the one with the fewest connections, "
            + "roundrobin: each in turn, random: the better of two draws, source: always the same for a client's address "
            + "(Maglev; on every proxy with the same upstreams), first: the first that has room for one more."),

        new("connect-timeout", "TIME", "connect", "5s", (_, r, v) => r.Connect.Timeout = Units.ParseTime(v),
            "Give up a server that does not answer within TIME, the look-up of its name included. With --retries a client "
            + "waits for up to 1 + N times as long."),
        new("retries", "N", "connect", "3", (_, r, v) => r.Connect.Retries = Units.ParseCount(v),
            "After a failed connect, try up to N other servers of the route. The other addresses of a name do not count: they "
            + "are all tried, and are dialled beside one that has not answered within 250 ms."),
        new("source", "ADDR", "connect", "",
            (_, r, v) => r.Connect.Source = IPAddress.TryParse(v, out IPAddress? address) ? address
                : throw new FormatException($"'{v}' is not an IP address"),
            "Connect to servers from this local address. Only servers of its family (IPv4 or IPv6) can be reached."),
        new("send-proxy", "off|v1|v2", "connect", "off",
            (_, r, v) => r.Connect.SendProxy = (ProxyVersion)Text.ParseWord(v, "version", "off", "v1", "v2"),
            "Tell servers the client's address in a PROXY protocol header. The built-in servers get none."),
        new("resolve", "TIME", "connect", "30s", (_, r, v) => r.Connect.Resolve = Units.ParseTime(v),
            "Keep the addresses of a server's name for TIME. A name is resolved when it is first needed, again when TIME has "
            + "passed or its addresses fail; while it does not resolve, the last known addresses serve."),

        new("max-fails", "N", "health", "3", (_, r, v) => r.Pool.MaxFails = Units.ParseCount(v),
            "Take a server for down after N failed connects, none later than --fail-timeout after the one before. When all are "
            + "down, all are tried. A lone server is never taken for down."),
        new("fail-timeout", "TIME", "health", "10s", (_, r, v) => r.Pool.FailTimeout = Units.ParseTime(v),
            "Leave a server that is down alone for TIME; then one client tries it, and the others when that went well."),
        new("check", "TIME", "health", "off", (_, r, v) => r.Pool.Check = Units.ParseTime(v),
            "Connect to each server every TIME (10 % more or less) to see whether it is up."),
        new("check-rise", "N", "health", "2", (_, r, v) => r.Pool.CheckRise = Units.ParseCount(v, least: 1),
            "A server is up again after N checks in a row that went well."),
        new("check-fall", "N", "health", "3", (_, r, v) => r.Pool.CheckFall = Units.ParseCount(v, least: 1),
            "A server is down after N checks in a row that did not."),
        new("check-send", "TEXT", "health", "", (_, r, v) => r.Pool.CheckSend = Text.Unescape(v),
            "A check sends TEXT. \\n \\r \\t \\0 \\\\ and \\xNN stand for bytes."),
        new("check-expect", "TEXT", "health", "", (_, r, v) => r.Pool.CheckExpect = Text.Unescape(v),
            "A check goes well only if TEXT is in the first 16k of the answer. Escapes as in --check-send."),

        new("max-connections", "N", "limits", "off", (_, r, v) => r.MaxConnections = Units.ParseCount(v),
            "Close at once what comes beyond N connections and finds no place in the --queue. Before the first --listen it "
            + "also bounds the sum over all routes."),
        new("max-connections-per-ip", "N", "limits", "off", (_, r, v) => r.Limits.MaxPerAddress = Units.ParseCount(v),
            "The same for one client address, which is the one in the PROXY header where --accept-proxy reads one."),
        new("ip6-prefix", "BITS", "limits", "64", (_, r, v) => r.Limits.Ip6Prefix = Units.ParseCount(v, least: 1, most: 128),
            "Of IPv6, so many bits are one client address."),
        new("connect-rate", "N/s [BURST]", "limits", "off", (_, r, v) => r.Limits.Rate = ConnectRate.Parse(v),
            "Close at once what comes faster than N connections a second (N/m: a minute). Up to BURST may come at once (N)."),
        new("connect-rate-per-ip", "N/s [BURST]", "limits", "off", (_, r, v) => r.Limits.RatePerAddress = ConnectRate.Parse(v),
            "The same for one client address. A route keeps count of 131,072 addresses in 3 MB; where there are too many with "
            + "connections, some are not counted, and the log says so."),
        new("refuse", "close|reset", "limits", "close",
            (_, r, v) => r.Limits.IsResetting = Text.ParseWord(v, "way", "close", "reset") == 1,
            "Close clients that are refused in good order (FIN), or reset them (RST). Of a flood of them the log has 100 lines "
            + "a second, and how many were left out."),
        new("queue", "N", "limits", "0", (_, r, v) => r.Pool.Queue = Units.ParseCount(v),
            "When every server has its max-connections, or the route, let up to N clients wait in order. Beyond that they are "
            + "closed at once."),
        new("queue-timeout", "TIME", "limits", "5s", (_, r, v) => r.Pool.QueueTimeout = Units.ParseTime(v),
            "Close a client that has waited for TIME."),
        new("max-bytes-up", "SIZE", "limits", "off", (_, r, v) => r.Bridge.MaxBytesUp = Units.ParseSize(v),
            "End a connection when exactly SIZE bytes have passed from the client."),
        new("max-bytes-down", "SIZE", "limits", "off", (_, r, v) => r.Bridge.MaxBytesDown = Units.ParseSize(v),
            "End a connection when exactly SIZE bytes have passed to the client."),
        new("rate-up", "RATE", "limits", "off", (_, r, v) => r.Bridge.RateUp = Units.ParseRate(v),
            "Let no more than RATE bytes pass from the client of each connection, as in 512k/s. What comes faster is not "
            + "received before its time, so the sender slows down. After a pause at most 50 ms' worth passes at once."),
        new("rate-down", "RATE", "limits", "off", (_, r, v) => r.Bridge.RateDown = Units.ParseRate(v),
            "The same, to the client."),
        new("rate-total-up", "RATE", "limits", "off", (_, r, v) => r.Bridge.RateTotalUp = Units.ParseRate(v),
            "The same from all clients of the route together. Those who send have equal parts of it."),
        new("rate-total-down", "RATE", "limits", "off", (_, r, v) => r.Bridge.RateTotalDown = Units.ParseRate(v),
            "The same to all clients of the route together."),
        new("max-lifetime", "TIME [JITTER]", "limits", "off",
            (_, r, v) => (r.Bridge.MaxLifetime, r.Bridge.LifetimeJitter) = Units.ParseTimes(v),
            "End a connection that is TIME old. With JITTER, a time as well, up to that much later, so that not "
            + "all end at once."),

        new("allow", "RULE", "access", "", (s, r, v) => r.Access.Add(new AccessRule(isAllow: true, v, s.Where, s.AccessFileOf)),
            "Let in those whom RULE names: CIDR, ADDRESS, all, unix or @FILE, then [DAYS] [HH:MM-HH:MM] [ZONE], such as "
            + "\"10.0.0.0/8 mon-fri 09:00-17:30 Europe/Paris\". The first rule that matches decides. Where none does, a client "
            + "is refused if there is any --allow. A FILE has one rule a line; it is read again when it "
            + "changes, and on HUP.", isList: true),
        new("deny", "RULE", "access", "", (s, r, v) => r.Access.Add(new AccessRule(isAllow: false, v, s.Where, s.AccessFileOf)),
            "Refuse those whom RULE names. It is written as for --allow, and has its place among those rules.", isList: true),
        new("close-at-window-end", "", "access", "", (_, r, _) => r.Access.ClosesAtWindowEnd = true,
            "Reset connections whose clients the rules no longer let in. They are looked at when the minute turns."),

        new("idle-timeout", "TIME", "timeouts", "1h", (_, r, v) => r.Bridge.IdleTimeout = Units.ParseTime(v),
            "End a connection in which nothing has moved for TIME."),
        new("fin-timeout", "TIME", "timeouts", "60s", (_, r, v) => r.Bridge.FinTimeout = Units.ParseTime(v),
            "The same, once one side has finished sending. The other side may go on for as long as it makes progress."),
        new("keepalive", "TIME", "timeouts", "60s", (_, r, v) => r.Bridge.Keepalive = Units.ParseTime(v),
            "Probe a connection that is silent for TIME (TCP keep-alive), on both sides. One that does not answer three "
            + "probes, TIME/4 apart, is dead."),
        new("preread-timeout", "TIME", "timeouts", "5s", (_, r, v) => r.Preread.Timeout = Units.ParseTime(v),
            "Reset a client whose PROXY header or TLS hello, where one is read, is not complete within TIME."),

        new("accept-proxy", "CIDR[,CIDR...]", "client address", "off", (_, r, v) => r.Preread.AcceptProxy(v),
            "Require a PROXY protocol header (version 1 or 2) from these senders, and take the address in it for the client's. "
            + "unix stands for whoever comes by a unix socket. From others no header is read."),

        new("dump", "off|text|hex", "inspect", "off",
            (_, r, v) => r.Put(r.Dump, isOn: (r.Dump.Format = Text.ParseWord(v, "format", "off", "text", "hex")) > 0),
            "Show what passes on stderr, as socat -v (text) or -x (hex) does: > from the client, < from the server, the time "
            + "(UTC), and the place in all that went this way. Who reads stderr too slowly misses some, and is told how much."),
        new("dump-limit", "SIZE", "inspect", "off", (_, r, v) => r.Dump.Limit = Units.ParseSize(v),
            "Show only the first SIZE bytes of a connection, both ways together."),
        new("record", "DIR", "inspect", "", (_, r, v) => r.Put(new RecordSettings(Text.FileName(v)), isOn: true),
            "Write what the client of each connection sends to DIR/ds_IP_TIME.log, and what its server sends to "
            + "us_IP_TIME.log. IP is the client's; TIME is UTC, as in 20261123125939, with _2, _3 and so on where the name is "
            + "taken. DIR must exist."),
        new("pcap", "FILE|-", "inspect", "", (s, r, v) => s.Captures.AddTo(r.Taps, v),
            "Capture connections in FILE (pcapng), or on stdout for '| wireshark -k -i -'. Each is shown as one TCP connection "
            + "from client to server, at the place of this option among the taps. For a unix socket and the built-in servers "
            + "stands 192.0.2.1 (clients) or 192.0.2.2, port 7 for echo, 9 for discard, else 1. Routes may share a FILE. A "
            + "disk or reader that fails, or that halts for 5 s, ends the capture and nothing else.", isList: true),
        new("pcap-rotate", "SIZE", "inspect", "off",
            (s, _, v) => s.Captures.Rotate = v is "0" or "off" ? 0 : Units.ParseSize(v, least: 64 << 10),
            "Go on in FILE1, FILE2 and so on when a capture file has reached SIZE (at least 64k), "
            + "as tcpdump -C does.", Scope.Process),

        new("replace-up", "OLD=>NEW", "modify", "", (_, r, v) => MatchSettings.Add(r.Taps, isUp: true, MatchRule.ParseReplace(v)),
            "Put the bytes NEW in the place of OLD in what clients send. Repeatable, and as cheap for many: the leftmost match "
            + "wins, of those in one place the one written first, and what was put in is not looked at again. Escapes as in "
            + "--check-send; \\x3d> is a => in OLD. Bytes that may become a match are held until more comes, but no longer "
            + "than 100 ms: then they go on as they are. A protocol that says lengths beforehand (HTTP's Content-Length, "
            + "redis) breaks when OLD and NEW differ in length; what TLS carries is not seen.", isList: true),
        new("replace-down", "OLD=>NEW", "modify", "",
            (_, r, v) => MatchSettings.Add(r.Taps, isUp: false, MatchRule.ParseReplace(v)),
            "The same in what servers send.", isList: true),
        new("block-up", "PATTERN", "modify", "", (_, r, v) => MatchSettings.Add(r.Taps, isUp: true, new MatchRule(v, v, null)),
            "Reset the connection before the bytes PATTERN pass from a client. They are found as by --replace-up; when a "
            + "client waits 100 ms in the middle of them, the part before has passed, but never the rest.", isList: true),
        new("block-down", "PATTERN", "modify", "", (_, r, v) => MatchSettings.Add(r.Taps, isUp: false, new MatchRule(v, v, null)),
            "The same before they pass from a server.", isList: true),
        new("filter-up", "COMMAND", "modify", "", (_, r, v) => r.Taps.Add(new FilterSettings(v, isUp: true)),
            "Send what clients say through COMMAND, a process for each connection: stdin is the client, stdout the server "
            + "(both are sockets). Quotes and backslashes work as in a shell, but none is run, unless it is sh:COMMAND. Its "
            + "environment has TCPPROXY_CLIENT, TCPPROXY_UPSTREAM, TCPPROXY_ROUTE; its stderr is logged. Its end with status 0 "
            + "is a FIN, and what still comes is dropped; another end is a reset. It is killed when the connection ends, or "
            + "when it writes nothing for --fin-timeout after its client has finished.", isList: true),
        new("filter-down", "COMMAND", "modify", "", (_, r, v) => r.Taps.Add(new FilterSettings(v, isUp: false)),
            "The same for what servers say.", isList: true),

        new("toxic", "TYPE [KEY=VALUE...]", "faults", "", (_, r, v) => r.Taps.Add(ToxicSettings.Parse(v)),
            "Break connections on purpose, with toxiproxy's toxics. TYPE and its keys are one of: latency latency=MS "
            + "jitter=MS, bandwidth rate=KB/s, slow_close delay=MS, timeout timeout=MS, reset_peer timeout=MS, slicer "
            + "average_size=BYTES size_variation=BYTES delay=US, limit_data bytes=BYTES; each 0 unless given. Bare numbers are "
            + "in these units, toxiproxy's (KB is 1000 bytes, US a microsecond); 100ms, 64k/s and 10k are understood as well. "
            + "stream=upstream is for what the client sends (downstream), toxicity=0..1 for that share of the connections (1). "
            + "Repeatable: each works on the result of the one before.", isList: true),
        new("seed", "N", "faults", "", (s, _, v) => s.Seed = Units.ParseCount(v),
            "Let chance repeat itself: with the same N, the n-th connection of a route meets the same "
            + "toxics, jitter and slices.", Scope.Process),

        new("log", "FORMAT", "observe", "text",
            (s, _, v) => s.Log.Format = (LogFormat)Text.ParseWord(v, "format", "text", "json", "haproxy", "syslog", "off"),
            "Log as text (logfmt), json (the same keys), haproxy (connections as by option tcplog, in local time; the rest is "
            + "text), syslog (text in messages of RFC 5424, facility daemon, to /dev/log) or off.", Scope.Process),
        new("log-file", "FILE|unix:PATH", "observe", "", (s, _, v) => s.Log.SetFile(v),
            "Append the log to FILE instead of stderr; USR1 opens it anew, for those who rotate it. Or send each line to the "
            + "unix socket at PATH, and connect again when that is gone.", Scope.Process),
        new("log-level", "LEVEL", "observe", "info",
            (s, _, v) => s.Log.Level = (LogLevel)Text.ParseWord(v, "level", "debug", "info", "warn", "error"),
            "Log debug, info, warn or error and what is worse. The line of a connection is of level info.", Scope.Live),
        new("log-long", "TIME", "observe", "1h", (s, _, v) => s.Log.Long = Units.ParseTime(v),
            "Log a connection that lasts longer than TIME before its end too, and again each TIME: event connection-long, with "
            + "what has passed so far.", Scope.Live),
        new("log-skip-empty", "", "observe", "", (s, _, _) => s.Log.SkipsEmpty = true,
            "Do not log connections that clients end before a byte has passed either way: probes.", Scope.Live),
        new("control", "unix:PATH", "observe", "",
            (s, _, v) => s.Control = ListenAddress.Parse(v) is { Kind: AddressKind.Unix or AddressKind.Descriptor } path ? path
                : throw new FormatException($"'{v}' is no path of a unix socket; write unix:PATH"),
            "Take commands at PATH, which its owner alone may use (mode 0600). They are HAProxy's, and so are the answers: "
            + "what was written for its stats socket works. 'tcpproxy --ctl PATH help' lists them.", Scope.Process),
        new("ctl", "PATH COMMAND...", "observe", "",
            (s, _, v) => (s.Command, s.ControlPath) = (Command.Control, ListenAddress.ParsePath(v)),
            "Send COMMAND to the --control of a running tcpproxy (or to HAProxy's stats socket), print the answer, and exit: "
            + "0, or 1 when it is an error, or has not come within --timeout.", Scope.Invocation),
        new("stats", "ADDR", "observe", "",
            (s, _, v) => s.Stats = ListenAddress.Parse(v) is { PortCount: 1 } address ? address
                : throw new FormatException($"'{v}' is a range; one port is enough"),
            "Serve at ADDR, over HTTP, a live page of routes, servers and connections (/), /metrics for Prometheus, "
            + "/stats.json, and /healthz: 200, or 503 while draining or when a route has no server up. A port alone is "
            + "loopback only. Whoever can connect can see all of it.", Scope.Process),

        new("config", "FILE", "run", "", (s, _, v) => s.ConfigFile = Text.FileName(v),
            "Read options from FILE. One a line: its long name without dashes, then its value; # starts a comment. Options on "
            + "the command line win over the file's, in every route.", Scope.Invocation, letter: 'c'),
        new("check-config", "", "run", "", (s, _, _) => s.Command = Command.CheckConfig,
            "Say whether the command line and the file are valid, and exit.", Scope.Invocation),
        new("reload-dry-run", "", "run", "", (s, _, _) => s.Command = Command.ReloadDryRun,
            "Print what HUP would change in the running process, and exit: 0, or 1 when none answers at the --control of this "
            + "command line or file. + stands before what comes, - before what goes, ~ before what becomes another, and ! "
            + "before what only a restart changes.", Scope.Invocation),
        new("explain", "ADDRESS[@TIME]", "run", "", (s, _, v) => (s.Command, s.Explain) = (Command.Explain, new ExplainQuery(v)),
            "Print what each route would do with a client of ADDRESS (or unix), and why, and exit. TIME is local, as in "
            + "2026-11-23T08:30, or UTC with a Z behind it. Nothing is connected to, and no "
            + "name is looked up.", Scope.Invocation),
        new("drain-timeout", "TIME", "run", "30s", (s, _, v) => s.DrainTimeout = Units.ParseTime(v),
            "On TERM or INT stop accepting and let connections finish for up to TIME. A second "
            + "signal ends at once.", Scope.Live),
        new("threads", "N|auto", "run", "auto",
            (s, _, v) => s.Threads = v == "auto" ? 0 : Units.ParseCount(v, least: 1, most: 256),
            "Event loop threads. auto is one a processor.", Scope.Process),
        new("buffer-size", "SIZE", "run", "64k",
            (_, r, v) => r.Bridge.BufferSize = (int)Units.ParseSize(v, least: 256, most: 16 << 20),
            "Copy at most SIZE bytes at once in a direction (256 to 16m), and four times as many while it streams, copied or "
            + "spliced (256k at most). A connection that waits holds no buffer."),
        new("splice", "auto|off", "run", "auto", (_, r, v) => r.Bridge.IsSplicing = Text.ParseWord(v, "word", "auto", "off") == 0,
            "Move streams inside the kernel (Linux, splice(2)) instead of copying them."),
        new("user", "NAME[:GROUP]", "run", "", (s, _, v) => s.User = Account.Check(v),
            "Give up root for this user, its groups and GROUP (else its own), once all is bound and open. Names are those of "
            + "/etc/passwd and /etc/group; numbers work as well. There is no way back: what is opened later (--record, another "
            + "capture file, a listen below 1024 in a file that is read again) must be the user's to open, and what stands in "
            + "folders of root (--pid-file, unix sockets) is left there at the end. Filters "
            + "gain no privileges either.", Scope.Process),
        new("pid-file", "FILE", "run", "", (s, _, v) => s.PidFile = Text.FileName(v),
            "Write the process id to FILE when ready; removed at the end.", Scope.Process),
        new("port-file", "FILE", "run", "", (s, _, v) => s.PortFile = Text.FileName(v),
            "When ready, write the bound addresses to FILE, one a line in the order of the listens. It is written whole or not "
            + "at all, and removed at the end: a script waits for it and knows where port 0 has led.", Scope.Process),
        new("once", "", "run", "", (s, _, _) => s.Once = true,
            "Serve one connection, then exit: 0 if it ended well, else 1.", Scope.Process),
        new("install-service", "", "run", "", (s, _, _) => s.Command = Command.InstallService,
            "Print a systemd unit that runs this command line, with no more rights than it needs, and exit. On Windows print "
            + "the sc.exe command that makes a service of it.", Scope.Invocation),
        new("wait-for", "ADDR", "run", "", (s, _, v) => (s.Command, s.WaitFor) = (Command.WaitFor, UpstreamAddress.Parse(v)),
            "Wait until a server accepts connections at ADDR, and exit: 0 if it did "
            + "within --timeout, else 1.", Scope.Invocation),
        new("timeout", "TIME", "run", "30s", (s, _, v) => s.WaitTimeout = Units.ParseTime(v),
            "How long --wait-for and --ctl wait.", Scope.Invocation),
        new("quiet", "", "run", "", (s, _, _) => s.Log.Level = LogLevel.Warn,
            "Log warnings and errors only.", Scope.Live, letter: 'q'),
        new("verbose", "", "run", "", (s, _, _) => s.Log.Level = LogLevel.Debug,
            "Log everything.", Scope.Live, letter: 'v'),
        new("help", "", "run", "", (s, _, _) => s.Command = s.Where == "-h" ? Command.ShortHelp : Command.FullHelp,
            "Print help and exit. -h is short, --help is all of it.", Scope.Invocation, letter: 'h'),
        new("version", "", "run", "", (s, _, _) => s.Command = Command.Version,
            "Print the version and exit.", Scope.Invocation, letter: 'V'),
    ];

    internal static Option? Find(string name) => Array.Find(Table, option => option.Name == name);

    internal static Option? Find(char letter) => Array.Find(Table, option => option.Letter == letter);

    /// <summary>As it was typed; without a value if that is null.</summary>
    internal Choice Typed(string? value, string where) =>
        IsFlag == (value is null) ? new Choice(Name, Group, Scope, value ?? "", where)
        : throw new FormatException($"{where}: "
            + (value is null ? $"needs a value {Value}" : $"takes no value, but '{value}' was given"));
}

internal static class CommandLine
{
    private const int LargestFile = 16 << 20; // bytes: /dev/zero is not a configuration

    /// <exception cref="FormatException">what was typed is wrong; the message is the line for the user</exception>
    internal static Settings Parse(IReadOnlyList<string> arguments, Settings? running = null)
    {
        List<Choice> typed = [];
        List<string> positional = [];
        Read(arguments, typed, positional);
        Settings settings = new(running);
        RouteSettings defaults = new();
        Array.ForEach(Array.FindAll(Option.Table, option => option.Default.Length > 0),
            option => Apply(option.Typed(option.Default, ""), settings, defaults));
        typed.FindAll(choice => choice.Scope == Scope.Invocation).ForEach(choice => Apply(choice, settings, defaults));
        if (settings.Command == Command.Control)
        {
            settings.ControlWords = positional.Count > 0 ? string.Join(' ', positional)
                : throw new FormatException("--ctl: no command follows; 'help' lists them");
        }
        else if (settings.Command is Command.Run or Command.CheckConfig or Command.ReloadDryRun or Command.Explain
            or Command.InstallService)
        {
            AddRoutes(settings, defaults, typed, positional);
        }
        else if (settings.Command == Command.WaitFor && positional.Count > 0)
        {
            throw new FormatException($"'{positional[0]}': --wait-for takes one address and serves no route");
        }

        return settings;
    }

    // ---- reading: words to choices and positional arguments

    private static void Read(IReadOnlyList<string> arguments, List<Choice> typed, List<string> positional)
    {
        Queue<string> words = new(arguments);
        bool optionsEnded = false;
        int options = 0; // that had been typed before the last positional word
        while (words.TryDequeue(out string? word))
        {
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
                ReadLong(word, words, typed);
                if (typed[^1].Name == "ctl")
                {
                    positional.AddRange(words); // the command, whatever it looks like
                    return;
                }
            }
            else
            {
                ReadLetters(word, words, typed);
            }
        }
    }

    /// <summary>weight=3 and the like belong to the upstream, or the toxic, that they follow.</summary>
    private static void AddSetting(string word, List<Choice> typed, List<string> positional, bool isPositional)
    {
        if (isPositional && positional.Count > 1)
        {
            positional[^1] += $" {word}";
        }
        else if (!isPositional && typed[^1].Name is "upstream" or "toxic")
        {
            typed[^1] = typed[^1].With(word);
        }
        else
        {
            throw new FormatException($"'{word}': a setting of an upstream stands right after its address");
        }
    }

    /// <summary>--name, --name value or --name=value.</summary>
    private static void ReadLong(string word, Queue<string> rest, List<Choice> typed)
    {
        int equals = word.IndexOf('=', StringComparison.Ordinal);
        string name = equals < 0 ? word : word[..equals];
        Option option = Option.Find(name[2..]) ?? throw Unknown(name, "--", name[2..]);
        typed.Add(option.Typed(equals < 0 ? Value(option, name, rest) : word[(equals + 1)..], name));
    }

    /// <summary>A cluster of letters, the last of which may take a value: -qv, -l 8080, -l8080.</summary>
    private static void ReadLetters(string word, Queue<string> rest, List<Choice> typed)
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

            bool isAttached = !option.IsFlag && i + 1 < word.Length;
            typed.Add(option.Typed(isAttached ? word[(i + 1)..] : Value(option, name, rest), name));
            i = isAttached ? word.Length : i;
        }
    }

    /// <summary>The next word, if there is one, which a flag leaves where it is.</summary>
    private static string? Value(Option option, string name, Queue<string> rest) =>
        option.IsFlag || !rest.TryPeek(out string? next) ? null
        : next.Length < 2 || next[0] != '-' ? rest.Dequeue()
        : throw new FormatException($"{name}: needs a value {option.Value}, but the option '{next}' follows");

    private static FormatException Unknown(string where, string dashes, string name)
    {
        string? near = Text.Nearest(name, Array.ConvertAll(Option.Table, option => option.Name));
        return new FormatException(near is null ? $"{where}: unknown option; 'tcpproxy -h' lists them"
            : $"{where}: unknown option; did you mean '{dashes}{near}'?");
    }

    /// <summary>One option a line: name, blanks, value. A value may be quoted; # starts a comment.</summary>
    internal static List<Choice> ReadFile(string file, string text)
    {
        List<Choice> filed = [];
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
            filed.Add(option.Scope == Scope.Invocation
                ? throw new FormatException($"{at}: {name}: belongs on the command line, not in a file")
                : option.Typed(value.Length > 0 ? value : null, $"{at}: {name}"));
        }

        return filed;
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

    // ---- building: choices to routes

    /// <summary>The file's options stand in order; those of the command line before its first --listen then win
    /// over them in every route; a --listen on the command line adds a route of its own.</summary>
    private static void AddRoutes(Settings settings, RouteSettings defaults, List<Choice> typed, List<string> positional)
    {
        List<Choice> filed = [];
        if (settings.ConfigFile is { } file)
        {
            string text = "";
            Text.At("--config", () => text = Encoding.UTF8.GetString(WholeFile.Read(file, LargestFile)));
            filed = ReadFile(file, text);
        }

        bool isPositional = positional.Count > 0;
        int firstListen = typed.FindIndex(choice => choice.Name == "listen");
        List<Choice> head = firstListen < 0 ? typed : typed.GetRange(0, firstListen);
        if (isPositional && (firstListen >= 0 || settings.ConfigFile is not null))
        {
            throw Stray(positional[0], settings.ConfigFile is null ? "--listen" : "--config");
        }

        List<Choice> access = head.FindAll(choice => choice.Group == "access");
        Build(settings, defaults, [.. access, .. filed]); // first, for of those the first that matches wins
        if (settings.ConfigFile is not null && head.Exists(choice => choice.Name == "upstream"))
        {
            defaults.ClearUpstreams();
            settings.Routes.ForEach(route => route.ClearUpstreams());
        }

        foreach (Choice choice in head.FindAll(choice => choice.Group != "access"))
        {
            Apply(choice, settings, defaults);
            settings.Routes.ForEach(route => Apply(choice, settings, route));
        }

        settings.MaxConnections = defaults.MaxConnections;
        settings.Choices.AddRange(defaults.Choices.FindAll(choice => choice.Name == "max-connections"));
        if (isPositional)
        {
            settings.Routes.Add(Positional(defaults, positional));
        }

        Build(settings, defaults, typed.GetRange(head.Count, typed.Count - head.Count));
        if (settings.Routes.Count == 0)
        {
            throw new FormatException(settings.ConfigFile is { } empty ? $"{empty}: no route: it has no listen" :
                "no route: give LISTEN and UPSTREAM, as in 'tcpproxy 8080 example.org:80', or see 'tcpproxy -h'");
        }

        List<Choice> all = [.. filed, .. typed];
        if (all.Find(choice => choice.Name is "check-send" or "check-expect") is { } unused
            && !all.Exists(choice => choice.Name == "check"))
        {
            throw new FormatException($"{unused.Where}: is for checks, and without --check TIME there are none");
        }

        settings.Routes.ForEach(route => route.Validate());
    }

    private static void Build(Settings settings, RouteSettings defaults, List<Choice> choices)
    {
        RouteSettings current = defaults;
        foreach (Choice choice in choices)
        {
            if (choice.Name == "listen")
            {
                settings.Routes.Add(current = defaults.Clone());
                current.Where = $"{choice.Where}: ";
            }

            Apply(choice, settings, current);
        }
    }

    private static void Apply(Choice choice, Settings settings, RouteSettings route) => Text.At(choice.Where, () =>
    {
        Option option = Option.Find(choice.Name)!;
        settings.Where = choice.Where;
        option.Apply(settings, route, choice.Value);
        List<Choice> choices = option.Scope == Scope.Route ? route.Choices : settings.Choices;
        int same = option.IsList ? -1 : choices.FindIndex(other => other.Name == choice.Name);
        choices.RemoveRange(Math.Max(same, 0), same < 0 ? 0 : 1);
        choices.Insert(same < 0 ? choices.Count : same, choice);
    });

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
            Text.At("LOCAL_PORT", () => route.Listen = ListenAddress.Parse($"{Bracket(words[0])}:{words[1]}"));
            Text.At("FORWARD_PORT", () => route.Upstreams.Add(UpstreamSettings.Parse($"{Bracket(words[2])}:{words[3]}")));
            return words.Count == 4 ? route : throw new FormatException(
                $"'{words[4]}': unexpected argument after the four of the original form"
                + (Text.IsDigits(words[4]) ? $"; did you mean '--threads {words[4]}'?" : ""));
        }

        if (words.Count > 1 && IsHost(words[0]) && Text.IsDigits(words[1]))
        {
            throw new FormatException($"LISTEN: '{words[0]}' has no port; did you mean '{words[0]}:{words[1]}'? "
                + "(the original form is LOCAL_HOST LOCAL_PORT FORWARD_HOST FORWARD_PORT)");
        }

        Text.At("LISTEN", () => route.Listen = ListenAddress.Parse(words[0]));
        foreach (string word in words.GetRange(1, words.Count - 1))
        {
            Text.At("UPSTREAM", () => route.Upstreams.Add(Option.Find(word) is null ? UpstreamSettings.Parse(word)
                : throw new FormatException($"'{word}' is no address; did you mean '--{word}'?")));
        }

        return route;

        static string Bracket(string host) => host.Contains(':', StringComparison.Ordinal) ? $"[{host}]" : host;

        static bool IsHost(string word) => !Text.IsDigits(word)
            && (IPAddress.TryParse(word, out _) || !word.Contains(':', StringComparison.Ordinal));
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
          tcpproxy --ctl PATH COMMAND...                                       tell a running proxy something

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
          HUP        read the --config file and the lists of --allow and --deny again, and apply what is different
          USR1       open the --log-file again, for those who rotate it
          USR2       say in the log how things stand: routes, servers, connections, memory
        Exit status:
          0 done, 1 failed at run time, 2 wrong usage or configuration

        Examples:
          tcpproxy 8080 echo                              try it: what you send comes back
          tcpproxy :5432 db.internal:5432                 forward a port on all interfaces
          tcpproxy 127.0.0.1 8080 example.org 80          the original's four arguments
          tcpproxy :9000 10.0.0.5:9000 10.0.0.6:9000      two servers, the less busy one gets the next client

        """;

    internal const string Version = "0.1.0"; // the one place that says it: TcpProxy.csproj reads it here

    internal static string Short() =>
        Render(option => option.Help.Split(". ")[0].TrimEnd('.')) + "\n'tcpproxy --help' tells more.\n";

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

// == 3  COMMANDS ====================================================================================================
// What an administrator tells the running proxy by --control, and what the service manager is to run. Both know all that the
// proxy has, and it knows nothing of them.

/// <summary>A command of --control. Words and answers are HAProxy's, as far as there is such a thing here; what is wrong begins
/// with HAProxy's sentence for it.</summary>
internal sealed class ControlCommand(string words, string arguments, string help, Func<Proxy, string[], string>? answer = null)
{
    private const int Margin = 56; // where help starts
    private const int HeaviestWeight = 256;
    private const string Columns = // of HAProxy 2.6
        "pxname,svname,qcur,qmax,scur,smax,slim,stot,bin,bout,dreq,dresp,ereq,econ,eresp,wretr,wredis,status,weight,act,bck,"
        + "chkfail,chkdown,lastchg,downtime,qlimit,pid,iid,sid,throttle,lbtot,tracked,type,rate,rate_lim,rate_max,check_status,"
        + "check_code,check_duration,hrsp_1xx,hrsp_2xx,hrsp_3xx,hrsp_4xx,hrsp_5xx,hrsp_other,hanafail,req_rate,req_rate_max,"
        + "req_tot,cli_abrt,srv_abrt,comp_in,comp_out,comp_byp,comp_rsp,lastsess,last_chk,last_agt,qtime,ctime,rtime,ttime,"
        + "agent_status,agent_code,agent_duration,check_desc,agent_desc,check_rise,check_fall,check_health,agent_rise,agent_fall,"
        + "agent_health,addr,cookie,mode,algo,conn_rate,conn_rate_max,conn_tot,intercepted,dcon,dses,wrew,connect,reuse,"
        + "cache_lookups,cache_hits,srv_icur,src_ilim,qtime_max,ctime_max,rtime_max,ttime_max,eint,idle_conn_cur,safe_conn_cur,"
        + "used_conn_cur,need_conn_est,uweight,agg_server_status,agg_server_check_status,agg_check_status,-,ssl_sess,"
        + "ssl_reused_sess,ssl_failed_handshake,h2_headers_rcvd,h2_data_rcvd,h2_settings_rcvd,h2_rst_stream_rcvd,"
        + "h2_goaway_rcvd,h2_detected_conn_protocol_errors,h2_detected_strm_protocol_errors,h2_rst_stream_resp,h2_goaway_resp,"
        + "h2_open_connections,h2_backend_open_streams,h2_total_connections,h2_backend_total_streams,h1_open_connections,"
        + "h1_open_streams,h1_total_connections,h1_total_streams,h1_bytes_in,h1_bytes_out,h1_spliced_bytes_in,"
        + "h1_spliced_bytes_out";
    private static readonly ControlCommand[] Table =
    [
        new("disable server", "<route>/<server>", "set it maint", (proxy, words) => Put(proxy, words, ServerMode.Maintenance)),
        new("enable server", "<route>/<server>", "set it ready", (proxy, words) => Put(proxy, words, ServerMode.Ready)),
        new("get weight", "<route>/<server>", "of a server; and the one that was typed", GetWeight),
        new("reload", "[dry-run]", "read the file again, and apply (or say) what is different", Reload),
        new("set maxconn frontend", "<route> <n>", "its --max-connections; 0 = off, as below", SetRouteLimit),
        new("set maxconn global", "<n>", "the --max-connections of the process", SetLimit),
        new("set maxconn server", "<route>/<server> <n>", "its max-connections", SetServerLimit),
        new("set server", "<route>/<server> state ready|drain|maint", "drain: no new connections; maint: nor checks", SetServer),
        new("set server", "<route>/<server> weight <n>[%]", "its share; % of the one that was typed", SetServer),
        new("set severity-output", "none|number|string", "begin errors with [3]: or [err]:"), // ControlServer's own, as two below
        new("set weight", "<route>/<server> <n>[%]", "the same", (proxy, words) => SetWeight(proxy, words, 1)),
        new("show backend", "", "names of the routes", ShowRoutes),
        new("show info", "", "about the process, one key a line", ShowInfo),
        new("show servers state", "[<route>]", "modes, states and weights", ShowServers),
        new("show sess", "[<id>]", "connections that have a server (not those on the way to one)", ShowSessions),
        new("show stat", "[<route> <type> <sid>]", "counters of routes and servers, as CSV", ShowStat),
        new("show version", "", "of this program", (proxy, _) => proxy.Version),
        new("shutdown session", "<id>", "reset a connection", ShutDownSession),
        new("shutdown sessions server", "<route>/<server>", "reset those of a server", ShutDownSessions),
        new("help", "[<command>]", "all commands, or those that begin so", (_, words) => List(string.Join(' ', words))),
        new("prompt", "", "stay connected, with a prompt; or no longer"),
        new("quit", "", "disconnect"),
    ];

    private readonly string[] _words = words.Split(' ');
    private readonly Func<Proxy, string[], string>? _answer = answer;

    private string Words { get; } = words;
    private string Line { get; } = $"  {words} {arguments}".PadRight(Margin) + $": {help}\n";

    /// <exception cref="FormatException">something is wrong with it; the message is the answer</exception>
    internal static string Answer(Proxy proxy, string[] words)
    {
        ControlCommand? command = Array.FindLast(Table, one => words.AsSpan().StartsWith(one._words));
        return command?._answer is { } answer ? answer(proxy, words.AsSpan(command._words.Length).ToArray())
            : throw Unknown(words);
    }

    private static FormatException Unknown(string[] words)
    {
        string Typed(int count) => string.Join(' ', words, 0, Math.Min(count, words.Length));
        string all = Typed(words.Length);
        string? near = Array.Find(Table, one => Text.Nearest(Typed(one._words.Length), one.Words) is not null)?.Words;
        string meant = near is null || near.StartsWith(all, StringComparison.Ordinal) ? "" : $"; did you mean '{near}'?";
        return new FormatException($"Unknown command: '{Text.Escape(Typed(2))}'{meant}\n{List(all)}");
    }

    private static string List(string start)
    {
        ControlCommand[] found = Array.FindAll(Table, one => one.Words.StartsWith(start, StringComparison.Ordinal));
        return string.Concat(Array.ConvertAll(found.Length > 0 ? found : Table, one => one.Line));
    }

    // ---- what is named

    private static string At(string[] words, int index) => index < words.Length ? words[index] : "";

    private static FormatException None(string what, string name, List<string> known)
    {
        string meant = Text.Nearest(name, [.. known]) is { } near ? $"; did you mean '{near}'?" : "";
        return new FormatException($"No such {what}. There is no '{Text.Escape(name)}'{meant}");
    }

    private static List<Route> RoutesOf(Proxy proxy, string name, string what)
    {
        List<Route> found = proxy.Routes.FindAll(route => route.Title == name);
        return found.Count > 0 ? found : throw None(what, name, proxy.Routes.ConvertAll(route => route.Title));
    }

    private static List<Server> ServersOf(Route route)
    {
        List<Server> servers = [];
        route.Pools.ForEach(pool => servers.AddRange(pool.Servers()));
        return servers;
    }

    /// <summary>ROUTE/SERVER: that of this title, or all addresses of an upstream of this name; slashes may be in them.</summary>
    private static List<Server> ServersOf(Proxy proxy, string[] words)
    {
        string name = At(words, 0);
        int slash = name.IndexOf('/', StringComparison.Ordinal);
        List<Route> routes = proxy.Routes.FindAll(route => name.StartsWith($"{route.Title}/", StringComparison.Ordinal));
        routes = routes.Count > 0 ? routes
            : RoutesOf(proxy, slash >= 0 ? name[..slash] : throw new FormatException("Require 'backend/server'."), "backend");
        List<Server> found = [];
        List<string> known = [];
        foreach (Route route in routes)
        {
            List<Server> servers = ServersOf(route);
            known.AddRange(servers.ConvertAll(server => $"{route.Title}/{server.Title}"));
            found.AddRange(servers.FindAll(server =>
                name == $"{route.Title}/{server.Title}" || name == $"{route.Title}/{server.Upstream.Title}"));
        }

        return found.Count > 0 ? found : throw None("server", name, known);
    }

    private static int Count(string[] words, int index, string expected) =>
        int.TryParse(At(words, index), NumberStyles.None, CultureInfo.InvariantCulture, out int count) ? count
        : throw new FormatException(expected + (index >= words.Length ? "" : $" '{Text.Escape(words[index])}' is none"));

    // ---- to change

    private static string SetServer(Proxy proxy, string[] words)
    {
        int mode = Array.IndexOf(["ready", "drain", "maint"], At(words, 2));
        _ = ServersOf(proxy, words); // what is wrong with the name is said first
        return At(words, 1) switch
        {
            "weight" => SetWeight(proxy, words, 2),
            "state" when mode >= 0 => Put(proxy, words, (ServerMode)mode),
            "state" => throw new FormatException("'set server <srv> state' expects 'ready', 'drain' and 'maint'."),
            _ => throw new FormatException("usage: set server <backend>/<server> state | weight"),
        };
    }

    private static string Put(Proxy proxy, string[] words, ServerMode mode)
    {
        ServersOf(proxy, words).ForEach(server => server.Balancer.Put(server, mode));
        return "";
    }

    private static string GetWeight(Proxy proxy, string[] words) =>
        ServersOf(proxy, words)[0] is var server ? $"{server.Weight} (initial {server.Upstream.Weight})" : "";

    private static string SetWeight(Proxy proxy, string[] words, int index)
    {
        List<Server> servers = ServersOf(proxy, words);
        bool isPercent = At(words, index).EndsWith('%');
        int number = Count(Array.ConvertAll(words, word => word.TrimEnd('%')), index, "Require <weight> or <weight%>.");
        servers.ForEach(server => _ = Weight(server) <= HeaviestWeight ? 0
            : throw new FormatException($"Absolute weight can only be between 0 and {HeaviestWeight} inclusive."));
        servers.ForEach(server => server.Balancer.Weigh(server, (int)Weight(server)));
        return "";

        long Weight(Server server) => isPercent ? (long)server.Upstream.Weight * number / 100 : number;
    }

    private static string SetServerLimit(Proxy proxy, string[] words)
    {
        List<Server> servers = ServersOf(proxy, words);
        int most = Count(words, 1, "Require <maxconn>.");
        servers.ForEach(server => server.Balancer.Bound(server, most));
        return "";
    }

    private static string SetRouteLimit(Proxy proxy, string[] words)
    {
        List<Route> routes = words.Length > 0 ? RoutesOf(proxy, words[0], "frontend")
            : throw new FormatException("A frontend name is expected.");
        int most = Count(words, 1, "Integer value expected.");
        routes.ForEach(route => route.Bound(most));
        return "";
    }

    private static string SetLimit(Proxy proxy, string[] words)
    {
        proxy.Limit.Most = Count(words, 0, "Expects an integer value.");
        proxy.Routes.ForEach(route => route.Line.Serve());
        return "";
    }

    private static string Reload(Proxy proxy, string[] words)
    {
        bool isDry = words is ["dry-run"];
        return words.Length > 0 && !isDry ? throw new FormatException("'reload' and 'reload dry-run' are all there is.")
            : proxy.Reload(out string outcome, isDry) ? outcome : throw new FormatException(outcome);
    }

    // ---- connections

    private static List<Bridge> Sessions(string? id = null)
    {
        bool isHex = id?.StartsWith("0x", StringComparison.Ordinal) == true;
        _ = uint.TryParse(isHex ? id.AsSpan(2) : id, NumberStyles.AllowHexSpecifier, null, out uint number); // there is no 0
        List<Bridge> sessions = [];
        Watched[] seen = [];
        int count = Sweep.Copy(ref seen);
        foreach (Watched watched in seen.AsSpan(0, count))
        {
            if (watched is Bridge bridge && (id is null || bridge.Line.Id == number))
            {
                sessions.Add(bridge);
            }
        }

        sessions.Sort((a, b) => a.Line.Id.CompareTo(b.Line.Id)); // the oldest first
        return sessions;
    }

    private static string ShowSessions(Proxy proxy, string[] words)
    {
        List<Bridge> sessions = words.Length == 0 ? Sessions() : Sessions(words[0]);
        StringBuilder text = new(words.Length > 0 && sessions.Count == 0 ? throw new FormatException("Session not found.") : "");
        foreach (Bridge bridge in sessions)
        {
            ConnectionLine line = bridge.Line;
            string protocol = line.Client is not IPEndPoint client ? "unix_stream"
                : client.AddressFamily == AddressFamily.InterNetwork || client.Address.IsIPv4MappedToIPv6 ? "tcpv4" : "tcpv6";
            string route = Word(line.RouteStats.Title);
            text.Append($"0x{line.Id:x}: proto={protocol} src={Text.Of(line.Client)} fe={route} be={route} ")
                .Append($"srv={Word(line.ServerStats!.Title)} age={Age(line.Age)} idle={Age(bridge.Quiet)} ")
                .Append($"up={bridge.BytesUp} down={bridge.BytesDown}\n");
        }

        return text.ToString();
    }

    private static string ShutDownSession(Proxy proxy, string[] words)
    {
        List<Bridge> found = Sessions(words.Length > 0 ? words[0]
            : throw new FormatException("Session pointer expected (use 'show sess')."));
        (found.Count > 0 ? found[0] : throw new FormatException("No such session (use 'show sess').")).ShutDown();
        return "";
    }

    private static string ShutDownSessions(Proxy proxy, string[] words)
    {
        List<ServerStats> servers = ServersOf(proxy, words).ConvertAll(server => server.Stats);
        Sessions().FindAll(bridge => servers.Contains(bridge.Line.ServerStats!)).ForEach(bridge => bridge.ShutDown());
        return "";
    }

    // ---- to look at

    private static string ShowInfo(Proxy proxy, string[] words)
    {
        TimeSpan up = DateTime.UtcNow - proxy.StartedAt;
        long files = Descriptors.Limit;
        (long connections, long bytes) = (0, 0);
        new Totals(proxy).Routes.ForEach(route =>
            (connections, bytes) = (connections + route.Connections, bytes + route.BytesUp + route.BytesDown));
        return $"""
            Name: tcpproxy
            Version: {proxy.Version}
            Nbthread: {(proxy.Settings.Threads > 0 ? proxy.Settings.Threads : Environment.ProcessorCount)}
            Nbproc: 1
            Process_num: 1
            Pid: {Environment.ProcessId}
            Uptime: {up.Days}d {up.Hours}h{up.Minutes:00}m{up.Seconds:00}s
            Uptime_sec: {Seconds(proxy.StartedAt)}
            Ulimit-n: {files}
            Maxsock: {files}
            Maxconn: {(proxy.Limit.Most > 0 ? proxy.Limit.Most : files / 2)}
            Hard_maxconn: {files / 2}
            CurrConns: {proxy.Limit.Count}
            CumConns: {connections}
            node: {Environment.MachineName}
            Stopping: {(proxy.IsDraining ? 1 : 0)}
            Listeners: {proxy.Listeners}
            DroppedLogs: {proxy.Log.DroppedInAll}
            TotalBytesOut: {bytes}
            Start_time_sec: {(long)(proxy.StartedAt - DateTime.UnixEpoch).TotalSeconds}

            """;
    }

    private static string ShowRoutes(Proxy proxy, string[] words) =>
        $"# name\n{string.Concat(proxy.Routes.ConvertAll(route => $"{Word(route.Title)}\n"))}";

    /// <summary>HAProxy's format of version 1, with its numbers for states.</summary>
    private static string ShowServers(Proxy proxy, string[] words)
    {
        List<Route> routes = words.Length == 0 ? proxy.Routes : RoutesOf(proxy, words[0], "backend");
        StringBuilder text = new("1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight "
            + "srv_iweight srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state "
            + "srv_agent_state bk_f_forced_id srv_f_forced_id srv_fqdn srv_port srvrecord srv_use_ssl srv_check_port "
            + "srv_check_addr srv_agent_addr srv_agent_port\n");
        foreach (Route route in routes)
        {
            int id = 0;
            foreach (Server server in ServersOf(route))
            {
                IPEndPoint? target = server.Targets.Length > 0 ? server.Targets[0] as IPEndPoint : null;
                string check = !server.IsChecked ? "1 0 2 0" : !server.IsDown ? "6 3 4 6" : "8 2 0 6";
                text.Append($"{proxy.Routes.IndexOf(route) + 1} {Word(route.Title)} {++id} {Word(server.Title)} ")
                    .Append(target?.Address.ToString() ?? Word(server.Upstream.Address.Text))
                    .Append(!server.IsDown && server.Mode != ServerMode.Maintenance ? " 2 " : " 0 ")
                    .Append(server.Mode switch { ServerMode.Ready => 0, ServerMode.Drain => 8, _ => 1 })
                    .Append($" {server.Weight} {server.Upstream.Weight} {Seconds(server.Stats.Since)} {check} 0 0 0 ")
                    .Append(server.Resolver is null ? "-" : server.Upstream.Address.Host)
                    .Append($" {target?.Port ?? 0} - 0 0 - - 0\n");
            }
        }

        return text.ToString();
    }

    /// <summary>All rows, or those of a route, a type (the sum of 1 its own, 2 its servers' together, 4 its servers') and a
    /// server; -1 is any.</summary>
    private static string ShowStat(Proxy proxy, string[] words)
    {
        (int types, int only) = (-1, -1);
        if (words.Length > 0 && (words.Length != 3 || !int.TryParse(words[1], out types) || !int.TryParse(words[2], out only)))
        {
            throw new FormatException("usage: show stat [<route> <type> <sid>]; the answer is CSV");
        }

        _ = new Totals(proxy); // which has all of them look
        string[] columns = Columns.Split(',');
        StringBuilder text = new($"# {Columns},\n");
        List<Route> routes = proxy.Routes;
        for (int i = 0; i < routes.Count; i++)
        {
            bool isAsked = words.Length == 0 || words[0] == "-1" || words[0] == Text.Of(i + 1) || words[0] == routes[i].Title;
            foreach (Dictionary<string, object> row in isAsked ? RowsOf(routes[i], i + 1) : [])
            {
                if ((types & (1 << (int)row["type"])) != 0 && (only < 0 || only == (int)row["sid"]))
                {
                    text.AppendJoin(',', Array.ConvertAll(columns, column => Cell(row.GetValueOrDefault(column)))).Append(",\n");
                }
            }
        }

        return text.ToString();
    }

    private static List<Dictionary<string, object>> RowsOf(Route route, int id)
    {
        List<Dictionary<string, object>> rows = [];
        RouteStats stats = route.Stats;
        Add("FRONTEND", 0, 0, "OPEN", stats, "slim", Bound(route.Limit.Most), "stot", stats.Connections - stats.Refused,
            "conn_tot", stats.Connections, "dcon", stats.Refused);
        (long connections, int weight, int active, int backup) = (0, 0, 0, 0);
        foreach (ServerStats server in stats.Servers)
        {
            bool isUsable = server.State == "up";
            int share = server.Weight * server.Percent / 100;
            connections += server.Connections;
            weight += isUsable ? share : 0;
            active += isUsable && !server.IsBackup ? 1 : 0;
            backup += isUsable && server.IsBackup ? 1 : 0;
            Add(server.Title, 2, rows.Count, isUsable && !server.IsChecked ? "no check" : server.State.ToUpperInvariant(), server,
                "slim", Bound(server.MaxConnections), "stot", server.Connections, "lbtot", server.Connections, "weight", share,
                "uweight", server.Weight, "throttle", server.Percent < 100 ? server.Percent : "",
                "act", server.IsBackup ? 0 : 1, "bck", server.IsBackup ? 1 : 0, "chkdown", server.Downs,
                "lastchg", Seconds(server.Since), "last_chk", server.Check, "addr", server.Address,
                "ctime", server.ConnectMicroseconds / Math.Max(1, server.Connections) / 1000);
        }

        Add("BACKEND", 1, 0, active + backup > 0 ? "UP" : "DOWN", stats, "slim", Bound(route.Limit.Most), "qcur", stats.Queued,
            "qlimit", Bound(route.Settings.Pool.Queue), "stot", connections, "lbtot", connections, "weight", weight,
            "uweight", weight, "act", active, "bck", backup, "algo", RouteSettings.Policies[(int)route.Settings.Pool.Policy]);
        return rows;

        void Add(string name, int type, int sid, string status, Counters counters, params object[] own)
        {
            object[] cells = // column, value, column ...
            [
                "pxname", route.Title, "svname", name, "iid", id, "sid", sid, "type", type, "pid", 1, "mode", "tcp",
                "status", status, "scur", counters.Current, "smax", counters.Most,
                "bin", counters.BytesUp, "bout", counters.BytesDown,
                .. type == 0 ? [] : new object[] { "econ", counters.ConnectFailures, "wredis", counters.Retries,
                    "cli_abrt", counters.ClientResets, "srv_abrt", counters.ServerResets }, .. own,
            ];
            Dictionary<string, object> row = [];
            for (int i = 0; i < cells.Length; i += 2)
            {
                row[(string)cells[i]] = cells[i + 1];
            }

            rows.Add(row);
        }

        static object Bound(int most) => most > 0 ? most : "";
    }

    private static string Cell(object? value)
    {
        string text = $"{value}";
        return text.AsSpan().IndexOfAny(",\"\n") < 0 ? text : $"\"{text.Replace("\"", "\"\"", StringComparison.Ordinal)}\"";
    }

    /// <summary>A name between blanks.</summary>
    private static string Word(string name) => name.Replace(' ', '_');

    private static long Seconds(DateTime since) => Math.Max(0, (long)(DateTime.UtcNow - since).TotalSeconds);

    /// <summary>Its two largest units.</summary>
    private static string Age(TimeSpan time) => time.Days > 0 ? $"{time.Days}d{time.Hours}h"
        : time.Hours > 0 ? $"{time.Hours}h{time.Minutes}m"
        : time.Minutes > 0 ? $"{time.Minutes}m{time.Seconds}s" : $"{time.Seconds}s";
}

/// <summary>--install-service: how the machine's service manager is to run this command line.</summary>
internal static class ServiceText
{
    private const int Descriptors = 1 << 20; // as many as Linux lets any process have by itself (fs.nr_open)

    // folders that systemd makes, and gives to the service's user
    private static readonly string[] Tops = ["/run/", "/var/log/", "/var/lib/", "/var/cache/"];
    private static readonly string[] Makers = ["RuntimeDirectory", "LogsDirectory", "StateDirectory", "CacheDirectory"];

    /// <summary>The file, or the folder (which ends with a slash), that an option has us write.</summary>
    private static string[] Written(Choice choice) => choice.Name switch
    {
        "log-file" or "pid-file" or "port-file" => [choice.Value],
        "record" => [$"{choice.Value}/"],
        "pcap" when choice.Value != "-" => [choice.Value],
        "control" when choice.Value.StartsWith("unix:", StringComparison.Ordinal) => [choice.Value["unix:".Length..]],
        _ => [],
    };

    internal static string Of(Settings settings, string[] typed)
    {
        string program = Environment.ProcessPath ?? Path.GetFullPath(Environment.GetCommandLineArgs()[0]);
        string[] words = Array.FindAll(typed, word => word != "--install-service");
        return OperatingSystem.IsWindows() ? Windows(program, words) : Unit(settings, program, words);
    }

    /// <summary>For cmd.exe: a command line, as a C program splits it, as one word of another.</summary>
    internal static string Windows(string program, string[] words) =>
        "sc.exe create tcpproxy start= auto obj= \"NT AUTHORITY\\LocalService\" binPath= "
        + Text.QuoteForWindows(string.Join(' ', Array.ConvertAll([program, .. words], Text.QuoteForWindows))) + "\n";

    internal static string Unit(Settings settings, string program, string[] words)
    {
        List<Choice> choices = [.. settings.Choices];
        settings.Routes.ForEach(route => choices.AddRange(route.Choices));
        List<string> written = [];
        choices.ForEach(choice => written.AddRange(Written(choice)));
        List<ListenAddress> listens = settings.Routes.ConvertAll(route => route.Listen!);
        listens.AddRange(settings.Stats is { } stats ? [stats] : []);
        listens.ForEach(listen => written.AddRange(listen.Kind == AddressKind.Unix ? [listen.Host] : []));
        List<string> paths = [.. written, .. settings.AccessFiles.Keys, settings.ConfigFile ?? program];
        settings.Routes.ForEach(route => paths.AddRange(
            route.Upstreams.FindAll(server => server.Kind == AddressKind.Unix).ConvertAll(server => server.Address.Host)));
        string? folder = paths.Exists(path => !Path.IsPathRooted(path)) ? Environment.CurrentDirectory : null;
        paths = paths.ConvertAll(Path.GetFullPath);
        paths.AddRange([program, folder ?? program]);
        bool isPrivileged = listens.Exists(listen => listen.IsPrivileged);
        bool isUnix = listens.Exists(listen => listen.Kind == AddressKind.Unix);
        bool isPassed = settings.Control?.Kind == AddressKind.Descriptor
            || listens.Exists(listen => listen.Kind == AddressKind.Descriptor);
        bool isFiltering = settings.Routes.Exists(route => route.Taps.Exists(tap => tap is FilterSettings));
        string[] user = settings.User?.Split(':') ?? [];
        string command = Text.QuoteForSystemd(program, isProgram: true);
        string arguments = string.Join(' ', Array.ConvertAll(words, word => Text.QuoteForSystemd(word, isProgram: false)));
        bool isReading = settings.ConfigFile is not null || settings.AccessFiles.Count > 0;
        StringBuilder unit = new();
        Add("# /etc/systemd/system/tcpproxy.service\n[Unit]\nDescription=", "TCP proxy");
        Add("Wants=", "network-online.target");
        Add("After=", isPassed ? "network-online.target tcpproxy.socket" : "network-online.target");
        Add("Requires=", isPassed ? "tcpproxy.socket" : null);
        Add("StartLimitIntervalSec=", settings.Once ? null : "0"); // or five starts in vain were the last
        Add("\n[Service]\nType=", "notify");
        Add("Sockets=", isPassed ? "tcpproxy.socket" : null); // whatever this unit is called
        Add("NonBlocking=", isPassed ? "yes" : null); // or its start makes accept() block in another that has them
        Add("ExecStart=", $"{command} {arguments}");
        Add("ExecReload=", isReading ? $"{command} --check-config {arguments}" : null); // systemctl says when it is wrong
        Add("ExecReload=", "/bin/kill -HUP $MAINPID");
        Add("WorkingDirectory=", folder?.Replace("%", "%%", StringComparison.Ordinal));
        Add("Restart=", settings.Once ? "no" : "on-failure");
        Add("RestartSec=", settings.Once ? null : "1s");
        Add("RestartPreventExitStatus=", settings.Once ? null : Text.Of(ExitStatus.Usage));
        Add("WatchdogSec=", "30s");
        Add("TimeoutStopSec=", settings.DrainTimeout == TimeSpan.Zero ? "infinity"
            : $"{Text.Of((long)(settings.DrainTimeout + Supervisor.Spare).TotalSeconds)}s");
        Add("LimitNOFILE=", Text.Of(Descriptors));
        bool isTemporary = IsBelow("/tmp", "/var/tmp"); // which are private, whatever is said, with DynamicUser
        Add("DynamicUser=", user.Length == 0 && !isTemporary ? "yes" : null);
        Add("User=", user.Length > 0 ? user[0] : isTemporary ? "nobody" : null);
        Add("Group=", user.Length > 1 ? user[1] : null);
        Add("AmbientCapabilities=", isPrivileged ? "CAP_NET_BIND_SERVICE" : "");
        Add("CapabilityBoundingSet=", isPrivileged ? "CAP_NET_BIND_SERVICE" : "");
        Add("UMask=", isUnix ? "0007" : "0077"); // who connects to a unix socket must be allowed to write to it
        AddFolders();
        Add("ProtectSystem=", "strict");
        Add("ProtectHome=", IsBelow("/home", "/root", "/run/user") ? "read-only" : "yes");
        Add("PrivateTmp=", isTemporary ? "no" : "yes");
        Add("""
            NoNewPrivileges=yes
            PrivateDevices=yes
            ProtectClock=yes
            ProtectControlGroups=yes
            ProtectHostname=yes
            ProtectKernelLogs=yes
            ProtectKernelModules=yes
            ProtectKernelTunables=yes
            ProtectProc=invisible
            ProcSubset=pid
            RemoveIPC=yes
            RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
            RestrictNamespaces=yes
            RestrictRealtime=yes
            RestrictSUIDSGID=yes
            LockPersonality=yes
            SystemCallArchitectures=native
            SystemCallErrorNumber=EPERM
            SystemCallFilter=@system-service
            """, "");
        Add("SystemCallFilter=", isFiltering ? null : "~@privileged @resources");
        Add("MemoryDenyWriteExecute=", isFiltering ? null : "yes"); // a filter may compile as it runs
        Add("\n[Install]\nWantedBy=", "multi-user.target");
        return unit.ToString();

        void Add(string key, string? value) => unit.Append(value is null ? "" : $"{key}{value}\n");

        bool IsBelow(params string[] tops) =>
            paths.Exists(path => Array.Exists(tops, top => $"{path}/".StartsWith($"{top}/", StringComparison.Ordinal)));

        void AddFolders()
        {
            HashSet<string> known = [];
            foreach (string path in written.ConvertAll(Path.GetFullPath))
            {
                string parent = Path.GetDirectoryName(path) ?? "/";
                int top = Array.FindIndex(Tops, top => parent.StartsWith(top, StringComparison.Ordinal));
                string line = top < 0 ? $"ReadWritePaths={Text.QuoteForSystemd($"-{parent}", isProgram: true)}"
                    : $"{Makers[top]}={Text.QuoteForSystemd(parent[Tops[top].Length..], isProgram: true)}";
                Add(line, known.Add(line) ? "" : null);
            }
        }
    }
}

// == 4  PROXY =======================================================================================================
// Wires the parts of each route together, starts them, serves every accepted client through steps (2) to (8), and
// ends: no more accepting, bridges finish in time, the last lines are written. A reload is a start among what runs: all that
// may fail is done beside it, then Acceptors hand over to new Routes, which go on with what the old ones have counted.

/// <summary>What the command line asks for.</summary>
internal enum Command
{
    Run, ShortHelp, FullHelp, Version, CheckConfig, ReloadDryRun, Explain, InstallService, WaitFor, Control,
}

/// <summary>Where an option holds.</summary>
internal enum Scope
{
    Route, // for the route it stands in, or for every route when it stands before the first listen
    Process, // for the process, wherever it stands, and from its start to its end
    Live, // the same, but that a reload may change it
    Invocation, // the same, and has no meaning in a file
}

/// <summary>An option as it was typed and where, or its default, which was typed nowhere.</summary>
internal sealed class Choice(string name, string group, Scope scope, string value, string where)
{
    internal string Name { get; } = name;
    internal string Group { get; } = group;
    internal Scope Scope { get; } = scope;
    internal string Value { get; } = value;
    internal string Where { get; } = where;
    internal bool IsLasting => Scope == Scope.Process;

    /// <summary>Where it was typed, if anywhere: FILE:12, or --name.</summary>
    internal string At => Where.EndsWith($": {Name}", StringComparison.Ordinal) ? Where[..^(Name.Length + 2)] : Where;

    /// <summary>The same with one more word.</summary>
    internal Choice With(string word) => new(Name, Group, Scope, $"{Value} {word}", Where);

    public override string ToString() => $"{Name} {Value}".TrimEnd();

    internal bool Is(Choice other) => Name == other.Name && Value == other.Value;

    internal static bool AreSame(List<Choice> some, List<Choice> others, Func<Choice, Choice, bool> isSame)
    {
        int i = 0;
        return some.Count == others.Count && some.TrueForAll(one => isSame(one, others[i++]));
    }
}

/// <summary>All that was asked for. A process that is <paramref name="running"/> goes on with the lists that it has.</summary>
internal sealed class Settings(Settings? running = null)
{
    internal Command Command { get; set; }
    internal string? ConfigFile { get; set; }
    internal UpstreamAddress? WaitFor { get; set; }
    internal TimeSpan WaitTimeout { get; set; }
    internal string ControlPath { get; set; } = ""; // of --ctl
    internal string ControlWords { get; set; } = "";
    internal ListenAddress? Control { get; set; }
    internal ExplainQuery? Explain { get; set; }
    internal List<Choice> Choices { get; private set; } = []; // of the process
    internal List<RouteSettings> Routes { get; private set; } = [];
    internal Dictionary<string, AccessFile> AccessFiles { get; private set; } = []; // of all routes, by their paths
    internal string Where { get; set; } = ""; // the option that is being applied was typed
    internal LogSettings Log { get; } = new();
    internal ListenAddress? Stats { get; set; }
    internal CaptureSettings Captures { get; } = new();
    internal int MaxConnections { get; set; } // over all routes; 0 = off
    internal TimeSpan DrainTimeout { get; set; }
    internal int Threads { get; set; } // 0 = one a processor
    internal long Seed { get; set; } = Random.Shared.NextInt64(); // of the toxics' chance
    internal string? User { get; set; } // and its group, as typed
    internal string? PidFile { get; set; }
    internal string? PortFile { get; set; }
    internal bool Once { get; set; }

    internal AccessFile AccessFileOf(string path) => AccessFiles.TryGetValue(path, out AccessFile? known) ? known
        : AccessFiles[path] = running?.AccessFiles.GetValueOrDefault(path) ?? new AccessFile(path);

    /// <summary>What a reload changes of the process.</summary>
    internal void TakeOver(Settings next, List<RouteSettings> routes)
    {
        (Routes, AccessFiles, MaxConnections, DrainTimeout) = (routes, next.AccessFiles, next.MaxConnections, next.DrainTimeout);
        (Log.Level, Log.Long, Log.SkipsEmpty) = (next.Log.Level, next.Log.Long, next.Log.SkipsEmpty);
        Choices = [.. Choices.FindAll(choice => choice.IsLasting), .. next.Choices.FindAll(choice => !choice.IsLasting)];
    }
}

internal sealed class RouteSettings
{
    internal static readonly string[] Policies = ["leastconn", "roundrobin", "random", "source", "first"]; // as the enum has them

    internal string? Name { get; set; }
    internal string Where { get; set; } = ""; // it was typed, for messages
    internal ListenAddress? Listen { get; set; }
    internal List<UpstreamSettings> Upstreams { get; private set; } = [];
    internal int MaxConnections { get; set; } // 0 = off
    internal LimitSettings Limits { get; private set; } = new();
    internal AccessRules Access { get; private set; } = new();
    internal List<Choice> Choices { get; private set; } = []; // all of the below, in words
    internal PoolSettings Pool { get; private set; } = new();
    internal ConnectSettings Connect { get; private set; } = new();
    internal BridgeSettings Bridge { get; private set; } = new();
    internal PrereadSettings Preread { get; private set; } = new();
    internal List<TapSettings> Taps { get; private set; } = []; // in the order of their options
    internal DumpSettings Dump { get; private set; } = new(); // among them where it is on
    internal string[]? ServerNames { get; set; } // of the upstreams that follow

    internal string Title => Name ?? Listen!.Text;
    internal string At => Where.StartsWith('-') ? "" : Where; // in the file

    /// <summary>Word for word, and in the same places, which stand in the log.</summary>
    internal bool Is(RouteSettings other) =>
        Choice.AreSame(Choices, other.Choices, (one, choice) => one.Is(choice) && one.Where == choice.Where);

    internal RouteSettings Clone()
    {
        RouteSettings copy = (RouteSettings)MemberwiseClone();
        copy.Upstreams = [.. Upstreams];
        copy.Limits = Limits.Clone();
        copy.Access = Access.Clone();
        copy.Choices = [.. Choices];
        copy.Pool = Pool.Clone();
        copy.Connect = Connect.Clone();
        copy.Bridge = Bridge.Clone();
        copy.Preread = Preread.Clone();
        copy.Dump = Dump.Clone();
        copy.Taps = Taps.ConvertAll(tap => tap == Dump ? copy.Dump : tap);
        return copy;
    }

    /// <summary>Of a kind of which a route has one, the last holds, and has its place.</summary>
    internal void Put(TapSettings tap, bool isOn)
    {
        Taps.RemoveAll(other => other.GetType() == tap.GetType());
        Taps.AddRange(isOn ? [tap] : []);
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
        Choices.RemoveAll(choice => choice.Name is "upstream" or "sni");
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

/// <summary>A route at run time. A reload makes a new one, which goes on with what the old one counts and
/// knows; clients stay with the route that they came to.</summary>
internal sealed class Route
{
    private readonly Dictionary<string, UpstreamPool> _named = []; // *.example.com is .example.com here
    private Route? _old; // until it is in force
    private long _rate; // the state of its connect rate
    private long _numbers; // given out
    private int _users = 1; // clients, and one while it is in force

    internal Route(RouteSettings settings, ConnectionLimit processLimit, Log log, Route? old = null)
    {
        Settings = settings;
        Title = settings.Title;
        settings.Bridge.Log = log;
        Stats = old?.Title == Title ? old.Stats : new RouteStats(Title);
        Limit = old?.Limit ?? new ConnectionLimit(settings.MaxConnections, processLimit);
        Line = old?.Line ?? new WaitingLine(settings.Pool.Queue, settings.Pool.QueueTimeout, CloseReason.LimitReached);
        Refusals = new Refusals(Title, log);
        Addresses = !settings.Limits.HasAddresses ? null
            : old?.Addresses is { } table && table.IsFor(settings.Limits) ? table : new AddressTable(settings.Limits, Title, log);
        Rates = settings.Bridge.HasRates ? new Rates(settings.Bridge, old?.Rates) : null;
        _old = old;
        HashSet<string> groups = [];
        HashSet<UpstreamPool> taken = []; // of the old one
        foreach (UpstreamSettings first in settings.Upstreams.FindAll(upstream => groups.Add(Group(upstream))))
        {
            UpstreamPool? before = old?.PoolOf(first.ServerNames) is { } one && taken.Add(one) ? one : null;
            UpstreamPool pool = new([.. settings.Upstreams.FindAll(upstream => Group(upstream) == Group(first))],
                settings.Pool, settings.Connect, Stats, log, before);
            Pools.Add(pool);
            Pool = first.ServerNames is null ? pool : Pool;
            Array.ForEach(first.ServerNames ?? [], name => _named[Key(name)] = pool);
        }

        NeedsName = _named.Count > 0;
        IsPlain = !NeedsName && !settings.Preread.HasSenders && settings.Connect.SendProxy == ProxyVersion.Off;

        static string Group(UpstreamSettings upstream) => string.Join(',', upstream.ServerNames ?? []);
    }

    internal RouteSettings Settings { get; }
    internal string Title { get; }
    internal RouteStats Stats { get; }
    internal ConnectionLimit Limit { get; }
    internal WaitingLine Line { get; } // for room among the connections
    internal Refusals Refusals { get; }
    internal AddressTable? Addresses { get; }
    internal Rates? Rates { get; }
    internal List<UpstreamPool> Pools { get; } = [];
    internal UpstreamPool? Pool { get; } // for those whom no --sni names
    internal bool NeedsName { get; }

    /// <summary>It needs no first bytes.</summary>
    internal bool IsPlain { get; }

    /// <summary>Or is: else it belongs to a reload that may still fail.</summary>
    internal bool WasInForce { get; private set; }

    /// <summary>Which of the route's connections it is, where taps want to know.</summary>
    internal long NextNumber() => Settings.Taps.Count == 0 ? 0 : Interlocked.Increment(ref _numbers);

    /// <summary>Null when there is room for one more.</summary>
    internal CloseReason? TryEnter() =>
        Settings.Limits.Rate is { } rate && !rate.TryTake(ref _rate, Stopwatch.GetTimestamp()) ? CloseReason.RateReached
        : Line.Count == 0 && Limit.TryEnter() ? null : CloseReason.LimitReached;

    internal void Leave()
    {
        Limit.Leave();
        Line.Serve();
    }

    /// <summary>The counters, with what is so at the moment.</summary>
    internal RouteStats Look(bool isInForce)
    {
        List<ServerStats> servers = [];
        int queued = Line.Count;
        Pools.ForEach(pool => queued += pool.Look(servers));
        (Stats.Servers, Stats.Queued, Stats.MaxConnections, Stats.IsInForce) = (servers, queued, Limit.Most, isInForce);
        return Stats;
    }

    /// <summary>From now on what it shares with the old one goes by its settings.</summary>
    internal void PutInForce()
    {
        WasInForce = true;
        Stats.Title = Title;
        Limit.Most = _old?.Settings.MaxConnections == Settings.MaxConnections ? Limit.Most : Settings.MaxConnections;
        (Line.Most, Line.Patience) = (Settings.Pool.Queue, Settings.Pool.QueueTimeout);
        Addresses?.Use(Settings.Limits, Title);
        Rates?.PutInForce();
        (_rate, _numbers) = _old is null ? default : (_old._rate, _old._numbers);
        _old = null;
        Pools.ForEach(pool => pool.PutInForce());
    }

    internal void StopChecks() => Pools.ForEach(pool => pool.StopChecks());

    /// <summary>A client has come, who is to be seen off with <see cref="End"/>.</summary>
    internal void Begin() => Interlocked.Increment(ref _users);

    /// <summary>A client has gone, or it is no longer in force. True when that was all.</summary>
    internal bool End() => Interlocked.Decrement(ref _users) == 0;

    /// <summary>What may take some time in it.</summary>
    internal List<TimeSpan> Bounds()
    {
        BridgeSettings bridge = Settings.Bridge;
        return
        [
            Settings.Pool.Check, Settings.Pool.Queue > 0 ? Settings.Pool.QueueTimeout : TimeSpan.Zero,
            Settings.Connect.Timeout, IsPlain ? TimeSpan.Zero : Settings.Preread.Timeout,
            bridge.IdleTimeout, bridge.FinTimeout, bridge.MaxLifetime,
            bridge.MaxBytesUp > 0 || bridge.MaxBytesDown > 0 ? bridge.QuotaGrace : TimeSpan.Zero,
        ];
    }

    private static string Key(string name) => name.TrimStart('*');

    /// <summary>The servers of a group: of the first of its names that is known.</summary>
    private UpstreamPool? PoolOf(string[]? names) => names is null ? Pool
        : Array.Find(names, name => _named.ContainsKey(Key(name))) is { } known ? _named[Key(known)] : null;

    internal void Bound(int most)
    {
        Limit.Most = most;
        Line.Serve();
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

internal sealed class Proxy : IObserved
{
    private const int LastLines = 500; // ms for bridges that were cut to end, and again for the last lines of the log
    private const int Handover = 1000; // ms in which a client may still come to a route that is no longer in force

    private readonly Func<Settings, Settings> _read; // what was typed, and the file as it is now
    private readonly Lock _changing = new(); // held while what follows changes
    private List<Acceptor> _acceptors = []; // owned; disposed by StopAccepting
    private List<Route> _routes = []; // in force
    private readonly List<Route> _used = []; // and those with clients, or soon in force, whose taps are open; under itself
    private readonly List<Acceptor> _watchers = []; // --stats, --control; owned; live until it has drained
    private readonly Dictionary<string, (string Text, DateTime At)> _files = []; // written by us, so ours to remove
    private readonly Account? _account; // to be
    private readonly Supervisor _supervisor;
    private Task _closing = Task.CompletedTask; // of taps that no route uses any more; under _used
    private readonly TaskCompletionSource _stopping = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource _idle = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Func<int> _count; // of the connections
    private int _serving = 1; // connections, and one for the accept loops as long as they run
    private volatile int _accepting = 1; // that one
    private int _signals;
    private int _onceTaken;
    private bool _onceFailed;

    internal Proxy(Settings settings, Account? account, Func<Settings, Settings> read)
    {
        (Settings, _account, _read) = (settings, account, read);
        _count = () => Math.Max(0, Volatile.Read(ref _serving) - _accepting);
        _supervisor = new Supervisor(() => $"{(IsDraining ? "draining" : Text.Count(_routes.Count, "route"))}, "
            + Text.Count(_count(), "connection"));
        _onceFailed = settings.Once; // until its connection has ended well
        Log = new Log(settings.Log);
        Limit = new ConnectionLimit(settings.MaxConnections, null);
    }

    public required string Version { get; init; }
    internal required Func<Proxy, string[], string> Answer { get; init; } // to a command of --control
    public DateTime StartedAt { get; } = DateTime.UtcNow;
    public bool IsDraining => _stopping.Task.IsCompleted;

    internal ConnectionLimit Limit { get; }
    internal List<Route> Routes => _routes;
    internal Settings Settings { get; } // as a reload leaves them
    internal Log Log { get; }
    internal int Listeners => _acceptors.Count;

    public List<RouteStats> Look()
    {
        List<RouteStats> all = Volatile.Read(ref _routes).ConvertAll(route => route.Look(isInForce: true));
        lock (_used)
        {
            for (int i = _used.Count - 1; i >= 0; i--) // of those with one name, which share their counters, the latest
            {
                if (_used[i].WasInForce && !all.Contains(_used[i].Stats))
                {
                    all.Add(_used[i].Look(isInForce: false));
                }
            }
        }

        return all;
    }

    /// <summary>Binds, serves, drains. False when --once was asked for and its connection failed.</summary>
    /// <exception cref="IOException">it cannot start: an address is taken, a file cannot be written</exception>
    internal async Task<bool> RunAsync()
    {
        Log.Start();
        try
        {
            lock (_changing)
            {
                StatsServer? stats = BindWatchers();
                PutInForce(Settings);
                stats?.Start();
                _watchers.ForEach(acceptor => acceptor.Start());
            }
            _supervisor.Ready();
            await _stopping.Task;
            if (!Settings.Once) // which accepts nobody else, but its one connection has all its time
            {
                _supervisor.Stopping(Settings.DrainTimeout);
            }

            await DrainAsync();
        }
        finally
        {
            StopAccepting();
            _watchers.ForEach(acceptor => acceptor.Dispose());
            RemoveFiles();
            lock (_used)
            {
                Array.ForEach([.. _used], Forget);
            }

            await _closing.ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
            Log.Stop(LastLines);
        }

        return !_onceFailed;
    }

    /// <summary>The first call drains, the second ends at once.</summary>
    internal void Stop()
    {
        bool isFirst = Interlocked.Increment(ref _signals) == 1;
        if (!isFirst || Settings.DrainTimeout > TimeSpan.Zero)
        {
            _ = EndWithinAsync(isFirst ? Settings.DrainTimeout : TimeSpan.Zero);
        }

        _stopping.TrySetResult();
    }

    /// <summary>HUP: reads the file and the lists of access rules again, and applies the difference, or nothing where
    /// anything is wrong: false then. <paramref name="words"/> is what the log says of it. A dry run only says what would
    /// be different.</summary>
    internal bool Reload(out string words, bool isDry = false)
    {
        lock (_changing)
        {
            string[] outcome;
            LogLevel level = LogLevel.Info;
            bool isRunning = _routes.Count > 0 && !IsDraining;
            if (isRunning && !isDry)
            {
                _supervisor.Reloading();
            }

            try
            {
                outcome = isRunning ? Change(isDry) : throw new IOException("this process starts or stops");
            }
#pragma warning disable CA1031 // whatever happens, the server goes on
            catch (Exception e)
#pragma warning restore CA1031
            {
                (level, outcome) = (LogLevel.Error, [$"{e.Message}; nothing has changed"]);
            }

            if (!isDry)
            {
                Array.ForEach(outcome, line => Log.Event(line[0] == '!' ? LogLevel.Warn : level, "reload", line));
            }

            if (isRunning && !isDry)
            {
                _supervisor.Ready();
            }

            words = string.Join('\n', outcome);
            return level == LogLevel.Info;
        }
    }

    private string[] Change(bool isDry)
    {
        List<AccessFile> lists = [.. Settings.AccessFiles.Values];
        string[] difference = [lists.Count == 0 ? "there is no --config file to be read again" : "the lists are read again"];
        if (Settings.ConfigFile is not null)
        {
            Settings next = _read(Settings);
            next.Captures.Rotate = Settings.Captures.Rotate;
            difference = Difference.Between(Settings, next);
            if (!isDry)
            {
                PutInForce(next);
            }
        }

        lists.FindAll(list => !isDry && Settings.AccessFiles.ContainsValue(list)).ForEach(list => list.Reload(Log));
        return difference;
    }

    /// <summary>Says in words how things stand.</summary>
    internal void TellState()
    {
        int most = 1000; // lines of servers
        Log.State($"running for {Units.Words(DateTime.UtcNow - StartedAt)}, {Text.Count(_count(), "connection")}, "
            + $"{Usage.Resident >> 10} KB of memory, {Text.Count(Log.DroppedInAll, "line")} of the log dropped"
            + (IsDraining ? ", draining" : ""));
        foreach (RouteStats route in Look())
        {
            Log.State(Text.Count(route.Current, "connection") + (route.Queued > 0 ? $", {route.Queued} waiting" : "")
                + (route.MaxConnections > 0 ? $", at most {route.MaxConnections}" : ""), route.Title);
            route.Servers[..Math.Clamp(most, 0, route.Servers.Count)].ForEach(server => Log.State(
                $"server {server.Title} is {server.State}, {Text.Count(server.Current, "connection")}"
                + (server.Weight == 1 ? "" : $", weight {server.Weight}") + (server.IsBackup ? ", backup" : ""), route.Title));
            most -= route.Servers.Count;
        }

        if (most < 0)
        {
            Log.State($"and {Text.Count(-most, "server")} more");
        }
    }

    /// <summary>What then still waits for a name server is left behind.</summary>
    private async Task EndWithinAsync(TimeSpan patience)
    {
        Sweep.StopAllAt(Environment.TickCount64 + (long)patience.TotalMilliseconds);
        await Task.Delay(patience + TimeSpan.FromMilliseconds(LastLines));
        _idle.TrySetResult();
    }

    // ---- start and end

    /// <summary>The routes of <paramref name="next"/> instead of those in force: at the start there are none. What may fail
    /// comes first.</summary>
    /// <exception cref="IOException">it cannot be: nothing has changed</exception>
    private void PutInForce(Settings next)
    {
        List<Route> routes = [];
        List<Acceptor> acceptors = [];
        List<Acceptor> left = [.. _acceptors];
        List<Action> listening = [];
        RouteSettings?[] before = Difference.Pair(next.Routes, _routes.ConvertAll(route => route.Settings));
        try
        {
            foreach (RouteSettings settings in next.Routes)
            {
                Route? old = _routes.Find(route => route.Settings == before[routes.Count]);
                routes.Add(old is not null && old.Settings.Is(settings) ? old : new Route(settings, Limit, Log, old));
                OpenTaps(routes[^1]);
            }

            foreach (Route route in routes)
            {
                int first = acceptors.Count;
                Bind($"{route.Settings.At}route {route.Title}", route.Settings.Listen!,
                    (client, portIndex) => Accepted(route, portIndex, client), acceptors, left);
                if (!_acceptors.Contains(acceptors[first]))
                {
                    listening.Add(() => Say(route.Settings, acceptors[first].Address));
                }
            }

            WriteFiles(acceptors);
        }
        catch
        {
            acceptors.FindAll(acceptor => !_acceptors.Contains(acceptor)).ForEach(acceptor => acceptor.Dispose());
            routes.FindAll(route => !_routes.Contains(route)).ForEach(Forget);
            throw;
        }

        List<Route> gone = _routes.FindAll(route => !routes.Contains(route));
        List<Route> added = routes.FindAll(route => !_routes.Contains(route));

        if (_routes.Count == 0)
        {
            _account?.Become();
            _supervisor.Start();
            Orphans.Adopt();
        }

        List<TimeSpan> bounds = [next.DrainTimeout, next.Log.Long, _supervisor.Bound];
        routes.ForEach(route => bounds.AddRange(route.Bounds()));
        Sweep.Start(bounds);
        Limit.Most = next.MaxConnections == Settings.MaxConnections ? Limit.Most : next.MaxConnections;
        gone.ForEach(route => route.StopChecks());
        added.ForEach(route => route.PutInForce());
        acceptors.ForEach(acceptor => acceptor.Start());
        left.ForEach(acceptor => acceptor.Dispose());
        (_routes, _acceptors) = (routes, acceptors);
        Settings.TakeOver(next, routes.ConvertAll(route => route.Settings));
        _ = AccessFile.WatchAsync([.. Settings.AccessFiles.Values], Log);
        _ = RetireAsync(gone);
        listening.ForEach(say => say());

        void Say(RouteSettings route, string address) => Log.Listening(
            route.Title, route.Listen!.PortCount == 1 ? address : route.Listen.Text,
            string.Join(' ', route.Upstreams.ConvertAll(upstream => upstream.Address.Text)));
    }

    /// <summary>One that is open, for another route or the old one, serves, and is kept open from here on.</summary>
    private void OpenTaps(Route route)
    {
        List<TapSettings> taps = route.Settings.Taps;
        List<TapSettings> missing;
        lock (_used)
        {
            if (_used.Contains(route))
            {
                return; // it is in force, and its connections go through the list
            }

            List<TapSettings> open = [];
            _used.ForEach(used => open.AddRange(used.Settings.Taps));
            for (int i = 0; i < taps.Count; i++)
            {
                taps[i] = open.Find(taps[i].Is) ?? taps[i];
            }

            missing = taps.FindAll(tap => !open.Contains(tap));
            _used.Add(route);
        }

        missing.ForEach(tap => Open(route.Settings, tap));
    }

    private void Open(RouteSettings route, TapSettings tap)
    {
        try
        {
            tap.Open(Log);
        }
        catch (IOException e)
        {
            throw new IOException($"{route.At}{e.Message}");
        }
    }

    private void Bind(string what, ListenAddress address, Action<Socket, int> accepted, List<Acceptor> acceptors,
        List<Acceptor>? left = null, bool isPrivate = false)
    {
        try
        {
            Acceptor.Bind(address, Log, accepted, acceptors, left, isPrivate);
        }
        catch (Exception e) when (e is SocketException || Text.IsOfFile(e))
        {
            throw new IOException($"{what}: cannot listen on {address.Text}: {Text.Reason(e)}"
                + (address.IsPrivileged && e is SocketException { SocketErrorCode: SocketError.AccessDenied }
                    ? "; ports below 1024 are for root, or for CAP_NET_BIND_SERVICE" : ""));
        }
    }

    private StatsServer? BindWatchers()
    {
        StatsServer? stats = null;
        if (Settings.Stats is { } address)
        {
            stats = new StatsServer(this, Log);
            Bind("--stats", address, (client, _) => stats.Accepted(client), _watchers);
            Log.Event(LogLevel.Info, "stats", _watchers[0].Address);
        }

        if (Settings.Control is { } path)
        {
            ControlServer control = new(words => Answer(this, words), Log);
            Bind("--control", path, (client, _) => control.Accepted(client), _watchers, isPrivate: true);
        }

        return stats;
    }

    private void WriteFiles(List<Acceptor> acceptors)
    {
        Write(Settings.PidFile, $"{Environment.ProcessId}\n");
        Write(Settings.PortFile, string.Concat(acceptors.ConvertAll(one => one.IsTwin ? "" : $"{one.Address}\n")));

        // what stands there stays: it may be where only root could write (--user)
        void Write(string? path, string text)
        {
            if (path is not null && _files.GetValueOrDefault(path).Text != text && WholeFile.Write(path, text))
            {
                _files[path] = (text, WholeFile.WrittenAt(path));
            }
        }
    }

    private void RemoveFiles()
    {
        foreach ((string path, (string _, DateTime at)) in _files)
        {
            if (WholeFile.WrittenAt(path) == at) // or a successor, which has come while this one drained, has its own there
            {
                WholeFile.Remove(path);
            }
        }
    }

    private async Task RetireAsync(List<Route> routes)
    {
        await Task.Delay(Handover);
        routes.ForEach(End);
    }

    /// <summary>A client of the route has gone. With the last one of one that is no longer in force go its taps.</summary>
    private void End(Route route)
    {
        if (route.End())
        {
            Forget(route);
        }
    }

    private void Forget(Route route)
    {
        lock (_used)
        {
            List<TapSettings> taps = _used.Remove(route) ? route.Settings.Taps : [];
            taps.FindAll(tap => !_used.Exists(other => other.Settings.Taps.Contains(tap))).ForEach(
                tap => _closing = Task.WhenAll(_closing, Task.Run(tap.Close))); // which may wait for its disk (rule 6)
        }
    }

    private void StopAccepting()
    {
        lock (_changing)
        {
            _acceptors.ForEach(acceptor => acceptor.Dispose());
            _acceptors.Clear();
        }
    }

    private async Task DrainAsync()
    {
        StopAccepting();
        _routes.ForEach(route => route.StopChecks());
        if (!Settings.Once)
        {
            Log.Count(LogLevel.Info, "draining", "connections", _count());
        }

        _accepting = 0;
        Leave();
        await _idle.Task;
        Log.Event(LogLevel.Info, "stopped", "");
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
        if (Settings.Once && Interlocked.Exchange(ref _onceTaken, 1) != 0)
        {
            client.Dispose();
            return;
        }

        if (Interlocked.Increment(ref _serving) == 1)
        {
            client.Close(0); // the process has ended meanwhile
            return;
        }

        if (Settings.Once)
        {
            _stopping.TrySetResult();
        }

        route.Begin();
        _ = ServeAsync(route, portIndex, client);
    }

    /// <summary>Steps (2) to (5). Nobody awaits it, so it ends without an exception whatever happens.</summary>
    private async Task ServeAsync(Route route, int portIndex, Socket client)
    {
        ConnectionLine line = Settings.Log.Format == LogFormat.Haproxy
            ? new HaproxyLine(route.Stats, _count) : new ConnectionLine(route.Stats);
        long number = route.NextNumber(); // in the order of the accepts
        CloseReason? reason = null;
        bool isAdmitted = false;
        Connection connection = default;
        Conversation? taps = null;
        try
        {
            route.Stats.Accepted();
            line.Client = client.RemoteEndPoint;
            if (Log.Has(LogLevel.Debug))
            {
                Log.Event(LogLevel.Debug, "accepted", Text.Of(line.Client), route.Title);
            }

            AccessRules rules = route.Settings.Access; // (2)
            reason = rules.IsEmpty || route.Settings.Preread.IsSender(line.Client) ? null : rules.Refuse(line.Client);
            reason ??= route.TryEnter();
            if (reason == CloseReason.LimitReached)
            {
                reason = route.Line.Most > 0 ? await route.Line.EnterAsync(route.Limit.TryEnter, client, line: line)
                    : route.Limit.TryEnter() ? null : reason; // a reload may have made room for the line that it has ended
            }

            isAdmitted = reason is null;
            if (!isAdmitted)
            {
                return;
            }

            route.Stats.Entered();
            using FirstBytes? first = route.IsPlain ? null : new FirstBytes();
            reason = first is null ? null : await ReadFirstAsync(route, client, line, first);
            if (reason is null && route.Addresses is { } addresses)
            {
                line.Place = addresses.TryEnter(line.Client, Stopwatch.GetTimestamp(), out reason);
            }

            if (reason is not null)
            {
                return;
            }

            connection = await route.PoolOf(first?.Name)!.ConnectAsync( // (3) (4)
                portIndex, line, client, hasSpoken: first is { Length: > 0 });
            line.Target = connection.Upstream?.Title ?? line.Target;
            reason = connection.Failure;
            if (reason is null)
            {
                line.Connected(connection.Server, connection.Place?.Stats);
                taps = route.Settings.Taps.Count == 0 ? null
                    : new Conversation(route.Title, line.Client, connection.Server, connection.Upstream!.Kind == AddressKind.Echo,
                        route.Settings.Bridge.FinTimeout, Settings.Seed, number);
                taps?.Begin(route.Settings.Taps, client, connection.Socket);
                reason = first is null ? null : await SendFirstAsync(route, client, line, first, connection, taps);
            }

            if (reason is null)
            {
                new RoutedBridge(this, route, line, client, connection, taps).Start(); // (5)
            }
        }
#pragma warning disable CA1031 // the last line of defence: one connection's surprise must not end the others
        catch (Exception e)
#pragma warning restore CA1031
        {
            reason = CloseReason.Unexpected(e);
        }
        finally
        {
            if (reason is not null)
            {
                connection.Socket?.Close(0);
                connection.Release();
                Close(route, client, reason);
                taps?.End(reason);
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

    /// <summary>What the route wants to know before it chooses a server. Null when there is one.</summary>
    private static async ValueTask<CloseReason?> ReadFirstAsync(
        Route route, Socket client, ConnectionLine line, FirstBytes first)
    {
        PrereadSettings settings = route.Settings.Preread;
        bool isSender = settings.IsSender(line.Client);
        CloseReason? refusal = !isSender && !route.NeedsName ? null
            : await first.ReadAsync(client, isSender, route.NeedsName, settings.Timeout);
        line.Client = first.Source ?? line.Client;
        if (first.Source is null && route.Settings.Connect.SendProxy != ProxyVersion.Off)
        {
            first.Destination = client.LocalEndPoint;
        }

        return refusal ?? (isSender ? route.Settings.Access.Refuse(line.Client) : null)
            ?? (route.PoolOf(first.Name) is not null ? null
                : new CloseReason("PR", $"no server for {first.Whom}", kind: "no server for the name"));
    }

    /// <summary>A header to the server, and what was read. Null when it is sent.</summary>
    private static async ValueTask<CloseReason?> SendFirstAsync(
        Route route, Socket client, ConnectionLine line, FirstBytes first, Connection connection, Conversation? taps)
    {
        AddressKind kind = connection.Upstream!.Kind;
        ConnectSettings settings = route.Settings.Connect;
        long quota = route.Settings.Bridge.QuotaUp(kind == AddressKind.Echo);
        int length = quota == 0 ? first.Length : (int)Math.Min(first.Length, quota);
        if (taps?.Up is { } up)
        {
            up.Spoken = first.Copy(length);
            length = 0;
        }

        int header = connection.Socket is null || settings.SendProxy == ProxyVersion.Off ? 0
            : first.Head(settings.SendProxy, line.Client, first.Destination);
        Socket? target = kind == AddressKind.Echo ? client : connection.Socket;
        CloseReason? refusal = header + length == 0 || target is null ? null
            : await first.SendAsync(target, header + length, settings.Timeout);
        line.BytesUp = refusal is null ? length : 0;
        return refusal is not null && target == client ? CloseReason.ClientReset : refusal;
    }

    /// <summary>What step (2) has taken is given back, and the log told.</summary>
    internal void End(Route route, bool isAdmitted, ConnectionLine line, CloseReason reason)
    {
        if (isAdmitted)
        {
            route.Addresses?.Leave(line.Place);
            route.Leave();
        }

        line.Ended(reason);
        route.Stats.Ended(line, reason, isAdmitted);
        if (reason.Error is { } error)
        {
            Log.Event(LogLevel.Error, "internal-error", error.ToString());
        }

        if (reason == CloseReason.OutOfDescriptors)
        {
            Exhaustion.Refused(Log); // one line an episode, not one a client
        }
        else if (!reason.IsRefusal || !Log.Has(LogLevel.Info) || route.Refusals.IsWorthLine(Environment.TickCount64))
        {
            Log.Ended(line); // (8)
        }

        _onceFailed = Settings.Once && reason != CloseReason.Done;
        End(route);
        Leave();
    }
}

/// <summary>A connection in steps (5) to (8), where it spends its life: of the steps before them nothing else is kept.</summary>
internal sealed class RoutedBridge(
    Proxy proxy, Route route, ConnectionLine line, Socket client, in Connection connection, Conversation? taps)
    : Bridge(line, client, connection.Socket, connection.Upstream!.Kind, route.Settings.Bridge, route.Rates, taps)
{
    private readonly Server _server = connection.Place!;
    private readonly Conversation? _taps = taps;
    private int _minute = -1; // in which the access rules were asked last; -1 = since it has begun, they were not

    internal override bool Check(long now)
    {
        if (route.Settings.Access.Expel(Line.Client, ref _minute) is { } reason)
        {
            Abort(reason);
        }

        return base.Check(now);
    }

    protected override void Ended(CloseReason reason)
    {
        _taps?.End(reason);
        _server.Leave();
        (Line.BytesUp, Line.BytesDown) = (BytesUp, BytesDown);
        proxy.End(route, isAdmitted: true, Line, reason);
    }
}

/// <summary>What a reload would change, from the words of the options: + and - before what comes and goes, ~ before what becomes
/// another, ! before what only a restart changes.</summary>
internal static class Difference
{
    internal static string[] Between(Settings old, Settings next)
    {
        List<string> lines = [];
        RouteSettings?[] before = Pair(next.Routes, old.Routes);
        lines.AddRange(old.Routes.FindAll(route => Array.IndexOf(before, route) < 0).ConvertAll(route => $"- {Listen(route)}"));
        for (int i = 0; i < before.Length; i++)
        {
            RouteSettings route = next.Routes[i];
            if (before[i] is not { } one)
            {
                lines.Add($"+ {Listen(route)}");
            }
            else if (Words(one.Choices, route.Choices) is { Count: > 0 } words)
            {
                lines.Add($"~ route {one.Title}: {string.Join(", ", words)}");
            }
        }

        lines.AddRange(Process(isLasting: false).ConvertAll(words => $"~ {words}"));
        List<string> ignored = Process(isLasting: true);
        lines.AddRange(ignored.Count == 0 ? [] : [$"! only a restart changes this: {string.Join(", ", ignored)}"]);
        return lines.Count == 0 ? ["nothing is different"] : [.. lines];

        List<string> Process(bool isLasting) => Words(
            old.Choices.FindAll(one => one.IsLasting == isLasting), next.Choices.FindAll(one => one.IsLasting == isLasting));

        static string Listen(RouteSettings route) => $"listen {route.Listen!.Text}"
            + (route.Name is null ? "" : $", route {route.Name}")
            + (route.Choices.Find(choice => choice.Name == "listen") is { } listen ? $" ({listen.At})" : "");
    }

    /// <summary>The one of <paramref name="old"/> that each route goes on from: of its title, or else at its address.</summary>
    internal static RouteSettings?[] Pair(List<RouteSettings> routes, List<RouteSettings> old)
    {
        RouteSettings?[] pairs = new RouteSettings?[routes.Count];
        Match((one, other) => one.Title == other.Title && one.Listen!.Text == other.Listen!.Text);
        Match((one, other) => one.Title == other.Title);
        Match((one, other) => one.Listen!.Text == other.Listen!.Text);
        return pairs;

        void Match(Func<RouteSettings, RouteSettings, bool> isSame)
        {
            for (int i = 0; i < pairs.Length; i++)
            {
                pairs[i] ??= old.Find(one => isSame(one, routes[i]) && Array.IndexOf(pairs, one) < 0);
            }
        }
    }

    private static List<string> Words(List<Choice> old, List<Choice> next)
    {
        List<string> words = [];
        List<Choice> removed = Without(old, next);
        List<Choice> added = Without(next, old);
        foreach (Choice one in removed)
        {
            Choice? other = added.Find(other => other.Name == one.Name && other.Value.Split(' ')[0] == one.Value.Split(' ')[0])
                ?? (Count(removed, one) == 1 && Count(added, one) == 1 ? added.Find(other => other.Name == one.Name) : null);
            words.Add(other is null ? $"{one} removed" : $"{one} -> {other.Value}");
            added.RemoveAll(choice => choice == other);
        }

        added.ForEach(one => words.Add($"{one} added"));
        bool isMoved = words.Count == 0 && !Choice.AreSame(old, next, (one, choice) => one.Is(choice));
        words.AddRange(isMoved ? ["the same in another order"] : []);
        return words;

        static int Count(List<Choice> choices, Choice like) => choices.FindAll(choice => choice.Name == like.Name).Count;
    }

    private static List<Choice> Without(List<Choice> choices, List<Choice> others)
    {
        List<Choice> left = [.. others];
        return choices.FindAll(choice => !left.Remove(left.Find(choice.Is)!));
    }
}

/// <summary>--explain: what would become of a client, and why.</summary>
internal sealed class ExplainQuery
{
    private readonly string _who;
    private readonly IPEndPoint? _client; // null = it comes by a unix socket
    private readonly DateTime _utc;

    /// <summary>ADDRESS[@TIME]</summary>
    /// <exception cref="FormatException">it is none</exception>
    internal ExplainQuery(string text)
    {
        int at = text.IndexOf('@', StringComparison.Ordinal);
        _who = at < 0 ? text : text[..at];
        _client = Network.Parse(_who).IsUnix ? null
            : IPAddress.TryParse(_who, out IPAddress? address) ? new IPEndPoint(address, 0)
            : throw new FormatException($"'{_who}' is a network; one address is asked for");
        _utc = at < 0 ? DateTime.UtcNow : Units.ParseMoment(text[(at + 1)..]);
    }

    internal string Answer(Settings settings)
    {
        StringBuilder text = new($"client {_who} at {Text.Of(_utc)}\n");
        using Log silent = new(new LogSettings { Format = LogFormat.Off });
        foreach (RouteSettings route in settings.Routes)
        {
            Verdict verdict = route.Access.Judge(_client, _utc);
            text.Append($"\nroute {route.Title}\n  {(verdict.IsAllowed ? "allowed" : "denied")}: {verdict.Words}\n");
            if (verdict.IsAllowed)
            {
                new Route(route, new ConnectionLimit(0, null), silent).Pools.ForEach(
                    pool => text.Append($"  {pool.Explain(_client)}\n"));
                route.Choices.FindAll(choice => choice.Where.Length > 0 && choice.Group is "balance" or "limits").ForEach(
                    choice => text.Append($"  --{choice}\n"));
            }
        }

        return text.ToString();
    }
}

// == 5  ACCEPTOR ====================================================================================================
// Binds a listen address, which may be several sockets, and accepts until it is disposed. An error of accept() is the
// client's (it left while it waited: go on) or the machine's (out of descriptors or memory: refuse those who wait,
// with the help of one descriptor kept in reserve, and go on). It is never a reason to stop listening.

internal sealed class Acceptor(
    Socket socket, string key, string? path, bool isTwin, Log log, Action<Socket> accepted) : IDisposable
{
    private const int Backlog = 4096; // the kernel takes its own limit when that is lower (net.core.somaxconn)
    private const int Burst = 64; // clients accepted without a wait
    private const int Pause = 50; // ms between two looks at the backlog while out of descriptors
    private const int FreePortTries = 20; // to find one port that is free on both loopback addresses

    private static readonly List<int> Adopted = []; // descriptors

    private readonly Socket _socket = socket; // owned; disposed when accepting has stopped
    private readonly string? _path = path; // of a unix socket that we made; removed by Dispose
    private readonly string _key = key; // what was bound, as it was asked for
    private readonly CancellationTokenSource _stopping = new();
    private volatile Action<Socket> _accepted = accepted;
    private Action<Socket> _next = accepted; // what Start puts in its place
    private bool _isRunning;

    internal string Address { get; } = path is not null ? $"unix:{path}" : Text.Of(socket.LocalEndPoint);

    /// <summary>The second socket of one listen address: [::1] beside 127.0.0.1 with the same port.</summary>
    internal bool IsTwin { get; } = isTwin;

    /// <summary>Accepts from now on, or hands over from now on to whom <see cref="Bind"/> has named last.</summary>
    internal void Start()
    {
        _accepted = _next;
        if (!_isRunning)
        {
            _isRunning = true;
            _ = RunAsync();
        }
    }

    /// <summary>A socket that is closed while it accepts would be disconnected by the runtime, for those as well who share
    /// it with us: so the accept ends first.</summary>
    public void Dispose()
    {
        _stopping.Cancel();
        if (!_isRunning)
        {
            Close();
        }

        if (_path is not null)
        {
            WholeFile.Remove(_path);
        }
    }

    /// <summary>Accepts until disposed; each client is handed over with its socket (rule 1).</summary>
    private async Task RunAsync()
    {
        for (int burst = 0; !_stopping.IsCancellationRequested; burst++)
        {
            try
            {
                ValueTask<Socket> accepting = _socket.AcceptAsync(_stopping.Token);
                burst = accepting.IsCompleted ? burst : 0;
                Socket client = await accepting;
                Exhaustion.Recovered(log);
                _accepted(client);
            }
            catch (OperationCanceledException)
            {
                break;
            }
            catch (SocketException e) when (Descriptors.AreExhausted(e.SocketErrorCode))
            {
                Exhaustion.RefuseWaiting(_socket, log);
                await Task.Delay(Pause);
            }
            catch (SocketException)
            {
                await Task.Delay(1); // this client has left before it was accepted; should it be more, no busy loop
            }

            if (burst == Burst)
            {
                burst = 0;
                await Task.Yield(); // others of this event loop have their turn
            }
        }

        Close();
    }

    private void Close()
    {
        _socket.Dispose();
        _stopping.Dispose();
    }

    // ---- binding

    /// <summary>Adds one acceptor a socket to <paramref name="acceptors"/>, which hands over once it is started. One of
    /// <paramref name="old"/> that has what is asked for is taken from there, with its socket and those who wait at it. The path
    /// of a private one is its owner's.</summary>
    /// <exception cref="SocketException">an address cannot be bound</exception>
    /// <exception cref="IOException">a descriptor or a path is not what it should be</exception>
    internal static void Bind(ListenAddress address, Log log, Action<Socket, int> accepted, List<Acceptor> acceptors,
        List<Acceptor>? old = null, bool isPrivate = false)
    {
        switch (address.Kind)
        {
            case AddressKind.Unix:
                Add(address.Text, () => [BindUnix(address.Host)]);
                break;
            case AddressKind.Descriptor:
                Array.ForEach(Descriptors.Inherited(address.Host),
                    descriptor => Add($"fd:{Text.Of(descriptor)}", () => [Adopt(descriptor)]));
                break;
            case AddressKind.Loopback:
                AddPorts("localhost", BindLoopback);
                break;
            default:
                Array.ForEach(Addresses(address.Host),
                    host => AddPorts($"{host}", port => [BindOne(new IPEndPoint(host, port))]));
                break;
        }

        void AddPorts(string host, Func<int, Socket[]> bind)
        {
            for (int i = 0; i < address.PortCount; i++)
            {
                int port = address.PortAt(i);
                Add($"{host}:{Text.Of(port)}", () => bind(port), i);
            }
        }

        void Add(string key, Func<Socket[]> bind, int portIndex = 0)
        {
            void HandOver(Socket client) => accepted(client, portIndex);

            int first = old?.FindIndex(one => one._key == key) ?? -1;
            if (first >= 0)
            {
                int count = first + 1 < old!.Count && old[first + 1].IsTwin ? 2 : 1;
                old.GetRange(first, count).ForEach(one => one._next = HandOver);
                acceptors.AddRange(old.GetRange(first, count));
                old.RemoveRange(first, count);
                return;
            }

            Socket[] sockets = bind();
            string? path = address.Kind == AddressKind.Unix ? address.Host : null;
            foreach (Socket socket in sockets)
            {
                acceptors.Add(new Acceptor(socket, key, path, socket != sockets[0], log, HandOver));
                if (path is null)
                {
                    SocketOptions.Relay(socket);
                }
                else if (isPrivate && !OperatingSystem.IsWindows())
                {
                    File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite); // nobody can have connected yet
                }

                socket.Listen(Backlog);
            }
        }

        static IPAddress[] Addresses(string host) =>
            host.Length == 0 ? [Socket.OSSupportsIPv6 ? IPAddress.IPv6Any : IPAddress.Any]
            : IPAddress.TryParse(host, out IPAddress? literal) ? [literal]
            : Dns.GetHostAddresses(host);
    }

    private static Socket BindOne(EndPoint endPoint)
    {
        Socket socket = new(endPoint.AddressFamily, SocketType.Stream,
            endPoint is IPEndPoint ? ProtocolType.Tcp : ProtocolType.Unspecified);
        try
        {
            if (endPoint is IPEndPoint { Address: var address } && address.Equals(IPAddress.IPv6Any))
            {
                socket.DualMode = true;
            }

            socket.Bind(endPoint);
            return socket;
        }
        catch (SocketException)
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>A bare port is loopback, and a client that says localhost may mean either family.</summary>
    private static Socket[] BindLoopback(int port)
    {
        for (int i = 1; ; i++)
        {
            Socket first = BindOne(new IPEndPoint(IPAddress.Loopback, port));
            IPEndPoint second = new(IPAddress.IPv6Loopback, ((IPEndPoint)first.LocalEndPoint!).Port);
            try
            {
                return [first, BindOne(second)];
            }
            catch (SocketException e) when (e.SocketErrorCode != SocketError.AddressAlreadyInUse)
            {
                return [first]; // no IPv6 here
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
        RemoveStale(endPoint, path);
        return BindOne(endPoint);
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
            if (Adopted.Contains(descriptor))
            {
                throw new IOException($"descriptor {descriptor} was taken before; what has its number now may be another's");
            }

            Socket socket = SocketPair.Own(descriptor);
            Adopted.Add(socket.SocketType == SocketType.Stream ? descriptor
                : throw new IOException($"descriptor {descriptor} is not a stream socket"));
            return socket;
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
    private static Socket? _reserve = NewReserve(); // under the gate
    private static long _refused; // since it began
    private static long _last; // when the last client was refused; 0 = it is over

    internal static void Refused(Log log)
    {
        Begin(log);
        Interlocked.Increment(ref _refused);
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
                    Interlocked.Increment(ref _refused);
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
        long last = Volatile.Read(ref _last);
        if (last != 0 && Environment.TickCount64 - last > Over && Interlocked.CompareExchange(ref _last, 0, last) == last)
        {
            log.Count(LogLevel.Warn, "recovered", "refused", Interlocked.Exchange(ref _refused, 0));
        }
    }

    private static void Begin(Log log)
    {
        if (Interlocked.Exchange(ref _last, Environment.TickCount64) == 0)
        {
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

// == 6  ADMISSION ===================================================================================================
// Who may connect: who and when, how many at once and how many in a while, in all and from one address. Refusing is cheap,
// and said only so often: nobody may fill a log by being refused.
//
// AccessRules of a route are matched in order, and the first that matches decides. An AccessRule has AccessLists of its own
// or those of its AccessFile: one for all networks that hold at the same times, which have one Schedule.

/// <summary>The rules of a route, and what they say.</summary>
internal sealed class AccessRules
{
    private AccessRule[] _rules = [];

    internal bool ClosesAtWindowEnd { get; set; }
    internal bool IsEmpty => _rules.Length == 0;

    internal AccessRules Clone() => (AccessRules)MemberwiseClone();

    internal void Add(AccessRule rule) => _rules = [.. _rules, rule];

    /// <summary>nginx's meaning, but for clients whom no rule names: where some are allowed, others are not.</summary>
    internal Verdict Judge(EndPoint? client, DateTime utc)
    {
        Network address = Network.Of(client);
        bool isAllowed = true;
        foreach (AccessRule rule in _rules)
        {
            int line = rule.Find(address, utc);
            if (line > 0)
            {
                return new Verdict(rule.IsAllow, rule, line);
            }

            isAllowed &= !rule.IsAllow;
        }

        return new Verdict(isAllowed, null, 0);
    }

    /// <summary>Null when the client may connect now.</summary>
    internal CloseReason? Refuse(EndPoint? client)
    {
        Verdict verdict = Judge(client, DateTime.UtcNow);
        return verdict.IsAllowed ? null : new CloseReason("PR", verdict.Words, isOrderly: true, kind: "access rule");
    }

    /// <summary>Null as long as one who has connected may stay: with --close-at-window-end it is asked whenever the
    /// <paramref name="minute"/> turns.</summary>
    internal CloseReason? Expel(EndPoint? client, ref int minute)
    {
        DateTime utc = ClosesAtWindowEnd ? DateTime.UtcNow : default;
        bool isDue = ClosesAtWindowEnd && utc.Minute != minute;
        minute = utc.Minute;
        return isDue && Judge(client, utc) is { IsAllowed: false } verdict
            ? new CloseReason("PD", $"window end: {verdict.Words}", kind: "window end") : null;
    }
}

internal readonly struct Verdict(bool isAllowed, AccessRule? rule, int line)
{
    internal bool IsAllowed { get; } = isAllowed;

    /// <summary>The rule that has decided, where it was typed, and the line of its file.</summary>
    internal string Words => rule is not null ? rule.Describe(line) : IsAllowed ? "no rule matches" : "no allow rule matches";
}

/// <summary>One --allow or --deny.</summary>
internal sealed class AccessRule
{
    private readonly string _words; // as it was typed
    private readonly AccessFile? _file;
    private readonly List<AccessList> _own = []; // where there is no file
    private readonly Schedule? _schedule; // of all that stands in the file

    /// <summary>Files are read by <paramref name="fileOf"/>, which may know them.</summary>
    /// <exception cref="FormatException">it is no rule, or its file is wrong</exception>
    internal AccessRule(bool isAllow, string text, string where, Func<string, AccessFile> fileOf)
    {
        (IsAllow, _words) = (isAllow, $"rule {where} {text}");
        if (text.StartsWith('@'))
        {
            string[] words = text.Split((char[])[' ', '\t'], 2);
            _schedule = Schedule.Parse(words.Length > 1 ? words[1] : "");
            _file = fileOf(Text.FileName(words[0][1..]));
        }
        else
        {
            AccessList.Add(_own, Encoding.UTF8.GetBytes(text), 1);
        }
    }

    internal bool IsAllow { get; }

    /// <summary>The number of a line that matches, 0 for none.</summary>
    internal int Find(in Network client, DateTime utc)
    {
        int line = 0;
        bool holds = _schedule?.Holds(utc) != false;
        List<AccessList> lists = _file?.Lists ?? _own;
        for (int i = 0; holds && i < lists.Count && line == 0; i++)
        {
            line = lists[i].Find(client, utc);
        }

        return line;
    }

    internal string Describe(int line) => _file is null ? _words : $"{_words} ({_file.Path}:{Text.Of(line)})";
}

/// <summary>The networks of a rule or a file that hold at the same times.</summary>
internal sealed class AccessList(string when)
{
    private const int Most = 100; // lists of a file: each costs every look-up a search

    private readonly string _when = when;
    private readonly Schedule? _schedule = Schedule.Parse(when);
    private readonly List<Network> _networks = [];

    /// <summary>WHO [DAYS] [HH:MM-HH:MM] [ZONE], added to the one of <paramref name="lists"/> that it belongs to.</summary>
    /// <exception cref="FormatException">it is no such line</exception>
    internal static void Add(List<AccessList> lists, ReadOnlySpan<byte> line, int number)
    {
        int blank = line.IndexOfAny((byte)' ', (byte)'\t');
        ReadOnlySpan<byte> who = blank < 0 ? line : line[..blank];
        string when = blank < 0 ? "" : Encoding.UTF8.GetString(line[blank..]).Trim();
        AccessList? list = lists.Find(list => list._when == when);
        if (list is null)
        {
            lists.Add(list = lists.Count < Most ? new AccessList(when)
                : throw new FormatException($"more than {Most} different times in one file"));
        }

        if (who.SequenceEqual("all"u8))
        {
            list._networks.AddRange(
                Network.Parse("unix"u8, number), Network.Parse("0.0.0.0/0"u8, number), Network.Parse("::/0"u8, number));
        }
        else
        {
            list._networks.Add(Network.Parse(who, number));
        }
    }

    /// <summary>Before anybody searches. Networks lie within each other or apart: those within another are not needed.</summary>
    internal void Sort()
    {
        Network? widest = null; // so far
        _networks.Sort();
        _networks.RemoveAll(network => widest?.Has(network) == true || (widest = network) is null);
    }

    /// <summary>The line of the widest network that has the client, 0 for none.</summary>
    internal int Find(in Network client, DateTime utc)
    {
        int next = _schedule?.Holds(utc) == false ? 0 : ~_networks.BinarySearch(client.AfterAll);
        return next > 0 && _networks[next - 1].Has(client) ? _networks[next - 1].Line : 0;
    }
}

/// <summary>A list in a file: one rule a line, # starts a comment. It is read again when it has changed and then rested for
/// a moment, or when somebody says so; while it is wrong the old list stays.</summary>
internal sealed class AccessFile
{
    private const int Pause = 1000; // ms between two looks
    private const int Largest = 128 << 20; // bytes
    private const int Large = 1 << 20; // worth a collection of what reading it has left, and of the list before

    private static AccessFile[] _watched = [];

    private readonly Lock _gate = new();
    private List<AccessList> _lists = []; // replaced as a whole
    private long _read; // its state when it was read
    private long _seen; // and at the last look

    /// <exception cref="FormatException">it cannot be read, or is wrong</exception>
    internal AccessFile(string path)
    {
        Path = path;
        Read();
    }

    internal string Path { get; }
    internal List<AccessList> Lists => Volatile.Read(ref _lists);

    /// <summary>Looks after them until it is called again, on threads that may block.</summary>
    internal static async Task WatchAsync(AccessFile[] files, Log log)
    {
        _watched = files;
        while (files.Length > 0 && _watched == files)
        {
            await Task.Delay(Pause);
            Array.ForEach(files, file => file.Look(log));
        }
    }

    internal void Reload(Log log)
    {
        lock (_gate)
        {
            try
            {
                Read();
                log.Event(LogLevel.Info, "list", $"{Path}: read again");
            }
            catch (FormatException e)
            {
                log.Event(LogLevel.Warn, "list", $"{e.Message}; the old list stays");
            }
        }
    }

    private void Look(Log log)
    {
        long state = State();
        if (state == _seen && state != _read) // else whoever writes it may not be done
        {
            Reload(log);
        }

        _seen = state;
    }

    /// <summary>When it was written, and its length, as one number.</summary>
    private long State()
    {
        try
        {
            FileInfo link = new(Path);
            FileInfo file = link.ResolveLinkTarget(returnFinalTarget: true) as FileInfo ?? link;
            return file.Exists ? unchecked((file.LastWriteTimeUtc.Ticks * 31) + file.Length) : 0;
        }
        catch (Exception e) when (Text.IsOfFile(e)) // links in a circle
        {
            return 0;
        }
    }

    private void Read()
    {
        _read = State();
        List<AccessList> lists = [];
        ReadOnlySpan<byte> text = WholeFile.Read(Path, Largest);
        int number = 0;
        try
        {
            foreach (Range range in text.Split((byte)'\n'))
            {
                number++;
                ReadOnlySpan<byte> line = text[range];
                int comment = line.IndexOf((byte)'#');
                line = (comment < 0 ? line : line[..comment]).Trim(" \t\r"u8);
                if (line.Length > 0)
                {
                    AccessList.Add(lists, line, number);
                }
            }
        }
        catch (FormatException e)
        {
            throw new FormatException($"{Path}:{Text.Of(number)}: {e.Message}");
        }

        lists.ForEach(list => list.Sort());
        Volatile.Write(ref _lists, lists);
        if (text.Length > Large)
        {
            // while all is quiet nobody else would
            GC.Collect(GC.MaxGeneration, GCCollectionMode.Aggressive, blocking: true, compacting: true);
        }
    }
}

/// <summary>When a rule holds: on some days, between two times of the day, by the clocks of a zone. A window that passes
/// midnight belongs to the day on which it begins. What clocks show twice in a night is in the window twice, what they skip
/// is not.</summary>
internal sealed class Schedule
{
    private const int Midnight = 24 * 60; // minutes
    private static readonly string[] Days = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

    private readonly TimeZoneInfo _zone = TimeZoneInfo.Local;
    private readonly int _days = (1 << 7) - 1; // bit 0 is Sunday's
    private readonly int _from; // minutes of the day, as below
    private readonly int _to = Midnight;

    private Schedule(ReadOnlySpan<string> words)
    {
        if (words is [var days, ..] && char.IsAsciiLetterLower(days[0]))
        {
            _days = 0;
            foreach (string part in days.Split(','))
            {
                _days |= DaysOf(part);
            }

            words = words[1..];
        }

        if (words is [var window, ..] && char.IsAsciiDigit(window[0]))
        {
            (_from, _to) = window.Split('-') is [var from, var to] ? (Minute(from), Minute(to)) : (0, 0);
            words = _from != _to && _from < Midnight ? words[1..]
                : throw new FormatException($"'{window}' is not a time window; write 09:00-17:30, or 22:00-06:00 for a night");
        }

        if (words is [var zone, ..])
        {
            _zone = words.Length == 1 && TimeZoneInfo.TryFindSystemTimeZoneById(zone, out TimeZoneInfo? found) ? found
                : throw new FormatException($"'{string.Join(' ', words!)}' is not known here as days, a time window or a time "
                    + "zone; write mon-fri 09:00-17:30 Europe/Paris, or some of it");
        }
    }

    /// <summary>[DAYS] [HH:MM-HH:MM] [ZONE]. Null when there are no words, which is always.</summary>
    /// <exception cref="FormatException">it is no such thing</exception>
    internal static Schedule? Parse(string text) =>
        text.Split((char[])[' ', '\t'], StringSplitOptions.RemoveEmptyEntries) is { Length: > 0 } words
            ? new Schedule(words) : null;

    internal bool Holds(DateTime utc)
    {
        DateTime there = TimeZoneInfo.ConvertTimeFromUtc(utc, _zone);
        int minute = (there.Hour * 60) + there.Minute;
        bool isYesterdays = _to < _from && minute < _to;
        int day = ((int)there.DayOfWeek + (isYesterdays ? 6 : 0)) % 7;
        return ((_days >> day) & 1) != 0 && (isYesterdays || (minute >= _from && (minute < _to || _to < _from)));
    }

    /// <summary>mon, or mon-fri; fri-mon goes over the end of the week.</summary>
    private static int DaysOf(string text)
    {
        string[] ends = text.Split('-', 2);
        int last = Text.ParseWord(ends[^1], "day", Days);
        int days = 1 << last;
        for (int day = Text.ParseWord(ends[0], "day", Days); day != last; day = (day + 1) % 7)
        {
            days |= 1 << day;
        }

        return days;
    }

    private static int Minute(string text) =>
        text is [>= '0' and <= '2', >= '0' and <= '9', ':', >= '0' and <= '5', >= '0' and <= '9']
        && ((text[0] - '0') * 600) + ((text[1] - '0') * 60) + ((text[3] - '0') * 10) + text[4] - '0' is int minute and <= Midnight
            ? minute : throw new FormatException($"'{text}' is not a time of the day; write 09:00-17:30");
}

/// <summary>At most so many at once (0 = any number), here and in all that encloses it.</summary>
internal sealed class ConnectionLimit(int most, ConnectionLimit? enclosing)
{
    private int _count;

    internal int Most { get; set; } = most;
    internal int Count => Volatile.Read(ref _count);

    internal bool TryEnter()
    {
        int count;
        do
        {
            count = Volatile.Read(ref _count);
            if (Most is int most && most != 0 && count >= most)
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
        long most = now + (interval * burst);
        long seen, next;
        do
        {
            seen = Volatile.Read(ref fullAt);
            next = Math.Max(seen, now) + interval;
            if (next > most && seen <= most)
            {
                return false;
            }
        }
        while (Interlocked.CompareExchange(ref fullAt, Math.Min(next, most), seen) != seen); // a slower rate may have left more
        return next <= most;
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

    /// <summary>Whether it can go on under other settings: an address is the same there.</summary>
    internal bool IsFor(LimitSettings next) => settings.Ip6Prefix == next.Ip6Prefix;

    internal void Use(LimitSettings next, string title) => (settings, route) = (next, title);

    /// <summary>The place, which is given to <see cref="Leave"/> in the end; -1 for one who is refused or not counted.</summary>
    internal int TryEnter(EndPoint? client, long now, out CloseReason? refusal)
    {
        refusal = null;
        Network address = Network.Of(client);
        if (address.IsUnix)
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

    private ulong Tag(in Network address)
    {
        UInt128 key = address.First & (UInt128.MaxValue << (address.IsV4 ? 0 : 128 - settings.Ip6Prefix));
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

// == 7  UPSTREAMS ===================================================================================================
// The servers of a route: which one comes next, which one instead when it does not answer, and who waits when all are full.
//
// A server is one upstream, or one of the addresses of its name. Down is an opinion: where nothing else is left, servers
// that are down are tried.
//
//     up -- --max-fails failed connects (Dialled) --> down for --fail-timeout, then one client tries it (TryTake)
//     up, down -- --check-fall failed checks (Checked) --> down until checks go well
//     down -- a connect (Dialled), or --check-rise checks (Checked), go well --> up, with a share that grows
//
// What an administrator says of a server (--control) is no opinion: one that is out is not tried, whatever else there is.

/// <summary>One upstream as it was typed: its address and what follows it.</summary>
internal sealed class UpstreamSettings(UpstreamAddress address)
{
    internal UpstreamAddress Address { get; } = address;
    internal int Weight { get; private set; } = 1; // 0 = drained: no new connections
    internal bool IsBackup { get; private set; }
    internal int MaxConnections { get; private set; } // 0 = off
    internal TimeSpan SlowStart { get; private set; } = TimeSpan.FromSeconds(10);
    internal string? Name { get; private set; }
    internal string Title => Name ?? Address.Text;
    internal AddressKind Kind => Address.Kind;

    /// <summary>The TLS names of the clients that it serves; null = it is of the fallback group.</summary>
    internal string[]? ServerNames { get; set; }

    /// <summary>Whether a word looks like a setting, known or not: backup, or key=value.</summary>
    internal static bool IsOne(string word) => word == "backup"
        || (word.IndexOf('=', StringComparison.Ordinal) is int end and > 0
            && word[0] != '-' && Array.TrueForAll(word[..end].ToCharArray(), c => char.IsAsciiLetterLower(c) || c is '-' or '_'));

    /// <summary>ADDR [weight=N] [backup] [max-connections=N] [slow-start=TIME] [name=TEXT]</summary>
    /// <exception cref="FormatException">it is none</exception>
    internal static UpstreamSettings Parse(string text)
    {
        string[] words = text.Replace('\t', ' ').Split(' ', StringSplitOptions.RemoveEmptyEntries);
        int first = text.StartsWith("unix:", StringComparison.Ordinal) ? Array.FindIndex(words, IsOne)
            : Math.Min(1, words.Length);
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
        string key = equals < 0 ? word : word[..equals];
        int index = Text.ParseWord(key, "setting", "backup", "weight", "max-connections", "slow-start", "name");
        if ((equals < 0) != (index == 0))
        {
            throw new FormatException(equals < 0 ? $"{key}: needs a value, as in {key}=5" : $"{key}: takes no value");
        }

        string value = word[(equals + 1)..];
        Text.At(key, () =>
        {
            switch (index)
            {
                case 0: IsBackup = true; break;
                case 1: Weight = Units.ParseCount(value, most: 256); break; // as HAProxy's
                case 2: MaxConnections = Units.ParseCount(value); break;
                case 3: SlowStart = Units.ParseTime(value); break;
                default: Name = value.Length > 0 ? value : throw new FormatException("a name has at least one character"); break;
            }
        });
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

/// <summary>One server: an upstream, or one of several addresses of an upstream's name.</summary>
internal sealed class Server(Balancer balancer, UpstreamSettings upstream, Resolver? resolver, EndPoint[] targets)
{
    internal ref int Active => ref Stats.Active;

    internal Balancer Balancer { get; } = balancer;
    internal UpstreamSettings Upstream { get; private set; } = upstream;
    internal Resolver? Resolver { get; set; } = resolver; // null where nothing needs to be looked up
    internal EndPoint[] Targets { get; } = targets; // localhost has two, the built-in servers none
    internal ServerStats Stats { get; } = new(balancer.RouteStats);
    internal string Title { get => Stats.Title; set => Stats.Title = value; } // for the log, and for Maglev
    internal int Weight => OwnWeight ?? Upstream.Weight;
    internal int MaxConnections => OwnMaxConnections ?? Upstream.MaxConnections;
    internal bool HasRoom => MaxConnections is int most && (most == 0 || Volatile.Read(ref Active) < most);
    internal bool IsOut => Weight == 0 || Mode != ServerMode.Ready;

    // the rest is the balancer's, under its gate; times are TickCount64
    internal int Turn { get; set; } // how much it is due
    internal bool IsDown { get; set; }
    internal long Until { get; set; } // down: it is left alone; up: the next failed connect counts with those before
    internal int Fails { get; set; } // connects, while it is up
    internal int Contrary { get; set; } // checks in a row that say otherwise
    internal long BackSince { get; set; } // 0 = its start is over
    internal UpstreamPool? Checker { get; set; } // which has a loop for it
    internal bool IsChecked => Checker is not null;
    internal ServerMode Mode { get; set; } // an administrator's, as both below; null = as typed
    internal int? OwnWeight { get; set; }
    internal int? OwnMaxConnections { get; set; }

    /// <summary>What an administrator said holds until the file says something else.</summary>
    internal void Use(UpstreamSettings next)
    {
        OwnWeight = next.Weight == Upstream.Weight ? OwnWeight : null;
        OwnMaxConnections = next.MaxConnections == Upstream.MaxConnections ? OwnMaxConnections : null;
        Upstream = next;
    }

    /// <summary>And for a new address of a name, where it holds for all that were known.</summary>
    internal void Follow(List<Server> others)
    {
        Mode = Common(other => other.Mode);
        OwnWeight = Common(other => other.OwnWeight);
        OwnMaxConnections = Common(other => other.OwnMaxConnections);

        T? Common<T>(Func<Server, T> of) =>
            others.Count > 0 && others.TrueForAll(other => Equals(of(other), of(others[0]))) ? of(others[0]) : default;
    }

    internal bool IsUp(long now) => !IsDown || now >= Until;
    internal bool IsCheckedDown => IsDown && Until == long.MaxValue;

    /// <summary>How much of its weight counts, in percent: all of it, or what a slow start allows.</summary>
    internal int Percent(long now)
    {
        double slow = Upstream.SlowStart.TotalMilliseconds;
        BackSince = now - BackSince >= slow ? 0 : BackSince;
        return BackSince == 0 ? 100 : Math.Max(1, (int)((now - BackSince) * 100 / slow));
    }

    /// <summary>The counters, with what is so at the moment.</summary>
    internal ServerStats Look()
    {
        Stats.Address = Targets.Length > 0 ? Text.Of(Targets[0]) : Upstream.Address.Text;
        (Stats.Weight, Stats.IsBackup, Stats.IsChecked) = (Weight, Upstream.IsBackup, IsChecked);
        (Stats.Current, Stats.MaxConnections) = (Volatile.Read(ref Active), MaxConnections);
        Stats.Percent = Percent(Environment.TickCount64);
        Stats.State = Mode == ServerMode.Maintenance ? "maint" : Mode == ServerMode.Drain ? "drain"
            : IsDown ? "down" : Weight == 0 ? "drain" : "up";
        return Stats;
    }

    /// <summary>A connection has ended; whoever waits in line has the place.</summary>
    internal void Leave()
    {
        Interlocked.Decrement(ref Active);
        Balancer.Line.Serve();
    }
}

/// <summary>The outcome of steps (3) and (4): a socket, or the failure. Releasing it gives the server's place back;
/// the socket then belongs to the bridge (rule 1).</summary>
internal readonly struct Connection(
    UpstreamSettings? upstream, Server? server = null, Dial? dial = null, CloseReason? failure = null)
{
    internal UpstreamSettings? Upstream { get; } = upstream; // null: it has not come to one of several
    internal Socket? Socket { get; } = dial?.Socket; // null for the built-in servers
    internal EndPoint? Server { get; } = dial?.Target;
    internal CloseReason? Failure { get; } = failure;
    internal Server? Place { get; } = server; // that has one for it

    internal void Release() => Place?.Leave();
}

/// <summary>Picks servers and keeps their state. A pool of one server without a bound needs no lock; any other takes one
/// for the moment of a choice, because the order of turns is shared by all who choose.</summary>
internal sealed class Balancer(
    UpstreamSettings[] upstreams, Resolver?[] resolvers, int portIndex, PoolSettings settings, IPAddress? source,
    RouteStats route, Log log)
{
    private readonly Lock _gate = new();
    private readonly List<Server> _candidates = []; // of the choice that is being made
    private readonly List<Server> _known = []; // in use, or with connections that are older than what the name is now
    private Server[] _servers = []; // in use; replaced as a whole
    private int _changes = -1; // of Resolver.Changes, when they were made
    private ushort[] _table = []; // Maglev's, of places in _servers; empty = to be made

    /// <summary>Where clients wait for room.</summary>
    internal WaitingLine Line { get; } = new(settings.Queue, settings.QueueTimeout, CloseReason.ServersFull);

    internal Server[] Servers => Volatile.Read(ref _servers);
    internal RouteStats RouteStats { get; private set; } = route;

    /// <summary>Adds its servers, and the names that are none yet; returns how many clients wait.</summary>
    internal int Look(List<ServerStats> servers)
    {
        servers.AddRange(Array.ConvertAll(Servers, server => server.Look()));
        for (int i = 0; i < upstreams.Length; i++)
        {
            if (resolvers[i] is { Addresses.Length: 0 } resolver)
            {
                servers.Add(new ServerStats(RouteStats)
                {
                    Title = $"{upstreams[i].Address.Host}:{Text.Of(upstreams[i].Address.PortAt(portIndex))}",
                    Weight = upstreams[i].Weight,
                    IsBackup = upstreams[i].IsBackup,
                    State = resolver.HasFailed ? "down" : "up",
                    LastFailure = resolver.HasFailed ? "name not resolved" : "",
                });
            }
        }

        return Line.Count;
    }

    private long FailTimeout => (long)settings.FailTimeout.TotalMilliseconds;

    // ---- the servers

    /// <summary>A reload. A server whose address and name stay keeps its state.</summary>
    internal void Use(
        UpstreamSettings[] newUpstreams, Resolver?[] newResolvers, PoolSettings newSettings, IPAddress? newSource,
        RouteStats newRoute)
    {
        lock (_gate)
        {
            List<UpstreamSettings> left = [.. upstreams]; // and those gone before which still have connections
            _known.ForEach(server => left.AddRange(left.Contains(server.Upstream) ? [] : [server.Upstream]));
            foreach (UpstreamSettings upstream in newUpstreams)
            {
                UpstreamSettings? same = left.Find(
                    one => one.Address.Text == upstream.Address.Text && one.Title == upstream.Title);
                left.Remove(same!);
                _known.FindAll(server => server.Upstream == same).ForEach(server => server.Use(upstream));
            }

            (upstreams, resolvers, settings, source) = (newUpstreams, newResolvers, newSettings, newSource);
            RouteStats = newRoute;
            _known.ForEach(server => server.Stats.RouteStats = newRoute);
            (Line.Most, Line.Patience) = (settings.Queue, settings.QueueTimeout);
            if (settings.Check == TimeSpan.Zero)
            {
                _known.FindAll(server => server.IsCheckedDown).ForEach(server => server.Until = 0); // clients find out
            }

            Volatile.Write(ref _changes, -1);
        }

        Update();
    }

    /// <summary>Takes over what look-ups have found. A server whose address stays keeps its state.</summary>
    internal void Update()
    {
        int changes = Resolver.Changes;
        if (changes == Volatile.Read(ref _changes))
        {
            return;
        }

        lock (_gate)
        {
            List<Server> servers = [];
            _known.RemoveAll(server => Volatile.Read(ref server.Active) == 0 && Array.IndexOf(_servers, server) < 0);
            for (int i = 0; i < upstreams.Length; i++)
            {
                Add(servers, upstreams[i], resolvers[i]);
            }

            _table = [];
            Volatile.Write(ref _servers, [.. servers]);
            Volatile.Write(ref _changes, changes);
        }

        Line.Serve();
    }

    /// <summary>One server, or one for each address of a name. Those of the source's family, where there are any.</summary>
    private void Add(List<Server> servers, UpstreamSettings upstream, Resolver? resolver)
    {
        UpstreamAddress address = upstream.Address;
        int port = address.PortAt(portIndex);
        EndPoint[] all = address.Kind switch
        {
            AddressKind.Tcp => Array.ConvertAll(
                resolver?.Addresses ?? Resolver.Known(address.Host)!, EndPoint (ip) => new IPEndPoint(ip, port)),
            AddressKind.Unix => [new UnixDomainSocketEndPoint(address.Host)],
            _ => [],
        };
        string title = upstream.Name ?? (address.Kind != AddressKind.Tcp ? address.Text
            : resolver is null && all.Length == 1 ? $"{all[0]}" : $"{address.Host}:{port}");
        EndPoint[] usable = Array.FindAll(all, target => target.AddressFamily == source?.AddressFamily);
        usable = usable.Length > 0 ? usable : all;
        foreach (EndPoint[] targets in resolver is null ? [usable] : Array.ConvertAll(usable, target => new[] { target }))
        {
            Server? server = _known.Find(server => server.Upstream == upstream && server.Targets.AsSpan().SequenceEqual(targets));
            if (server is null)
            {
                List<Server> others = _known.FindAll(other => other.Upstream == upstream);
                _known.Add(server = new Server(this, upstream, resolver, targets));
                server.Follow(others);
            }

            server.Resolver = resolver;
            server.Title = resolver is null || all.Length == 1 ? title : $"{title}/{targets[0]}";
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
        if (Servers is [{ IsOut: false, MaxConnections: 0 } lone] && tried is null)
        {
            Interlocked.Increment(ref lone.Active);
            return lone;
        }

        lock (_gate)
        {
            FindCandidates(tried, now, out isFull);
            Server? server = _candidates.Count == 0 || isFull ? null : Pick(client, now);
            if (server is not null)
            {
                Interlocked.Increment(ref server.Active);
                if (server.IsDown && now >= server.Until)
                {
                    server.Until = now + FailTimeout; // this client tries it for all
                }
            }

            return server;
        }
    }

    /// <summary>The best there are: servers that are up; where those are down or full, backups (nginx's meaning); where none
    /// of them is up, full or not, those that are down. Full ones are to be waited for.</summary>
    private void FindCandidates(List<Server>? tried, long now, out bool isFull)
    {
        const int Full = 2;
        const int DownAndFull = 4;
        int best = int.MaxValue;
        _candidates.Clear();
        foreach (Server server in _servers)
        {
            int rank = !server.IsUp(now) ? server.HasRoom ? 3 : DownAndFull
                : !server.HasRoom ? Full : server.Upstream.IsBackup ? 1 : 0;
            if (rank > best || server.IsOut || tried?.Contains(server) == true)
            {
                continue;
            }

            if (rank < best)
            {
                _candidates.Clear();
            }

            _candidates.Add(server);
            best = rank;
        }

        isFull = best is Full or DownAndFull;
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
        int draw = Random.Shared.Next(total);
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
        if (server.Resolver is not { Addresses.Length: > 1 } || server.MaxConnections > 0)
        {
            return null;
        }

        List<Server> racers = [server];
        lock (_gate)
        {
            racers.AddRange(Array.FindAll(_servers, other => other.Upstream == server.Upstream && other != server
                && !other.IsOut && (other.IsUp(now) || !server.IsUp(now)) && tried?.Contains(other) != true));
        }

        return Resolver.Interleave(racers, racer => racer.Targets[0].AddressFamily);
    }

    /// <summary>Another address of the same name, not tried yet, which costs none of the --retries.</summary>
    internal bool HasOther(Server server, List<Server> tried) =>
        Array.Exists(Servers, other => other.Upstream == server.Upstream && !other.IsOut && !tried.Contains(other));

    // ---- up and down

    /// <summary>A connect has ended, well or not.</summary>
    internal void Dialled(Server server, CloseReason? failure, long now)
    {
        bool isTelling = IsTelling(server, failure);
        if (failure is not null && isTelling)
        {
            server.Stats.Failed(failure);
        }

        if (!server.IsDown && (failure is null || !isTelling))
        {
            return;
        }

        lock (_gate)
        {
            if (server.IsCheckedDown)
            {
                return; // which only checks end
            }

            if (!isTelling)
            {
                server.Until = now; // it was not tried: the next client does
            }
            else if (failure is null)
            {
                Turn(server, isDown: false, "connected", now);
            }
            else if (settings.MaxFails > 0 && FailTimeout > 0 && _servers.Length > 1)
            {
                server.Fails = now <= server.Until ? server.Fails + 1 : 1;
                server.Until = now + FailTimeout;
                Turn(server, server.IsDown || server.Fails >= settings.MaxFails, failure.Words, now);
            }
        }
    }

    /// <summary>A check has ended, well or not. What connects have said before does not count any more when checks have turned
    /// the server: it was of the same illness.</summary>
    internal void Checked(Server server, CloseReason? failure, long now)
    {
        bool isDown = failure is not null;
        if (!IsTelling(server, failure))
        {
            return;
        }

        server.Stats.Check = failure is null ? "passed" : failure.Words;
        lock (_gate)
        {
            if (server.Mode == ServerMode.Maintenance || settings.Check == TimeSpan.Zero)
            {
                return; // it was on its way
            }

            server.Contrary = isDown == server.IsCheckedDown ? 0 : server.Contrary + 1;
            if (server.Contrary >= (isDown ? settings.CheckFall : settings.CheckRise))
            {
                server.Contrary = 0;
                Turn(server, isDown, isDown ? $"check: {failure!.Words}" : "check passed", now);
                server.Until = isDown ? long.MaxValue : now;
            }
        }
    }

    /// <summary>What failed was the server, or perhaps its address; that descriptors are short is no fault of its.</summary>
    private static bool IsTelling(Server server, CloseReason? failure)
    {
        if (failure is not null)
        {
            server.Resolver?.Doubt();
        }

        return failure is not { IsWorthRetry: false };
    }

    private void Turn(Server server, bool isDown, string reason, long now)
    {
        if (server.IsDown != isDown)
        {
            (server.IsDown, server.Fails) = (isDown, 0);
            server.BackSince = isDown || _servers.Length == 1 ? 0 : now;
            server.Stats.Turned(isDown);
            log.ServerState(RouteStats.Title, server.Title, !isDown, reason);
        }
    }

    // ---- an administrator's words

    /// <summary>Back from maintenance, in which nobody has looked at it, a server is up; the first check that fails says
    /// otherwise.</summary>
    internal void Put(Server server, ServerMode mode)
    {
        lock (_gate)
        {
            if (server.Mode == ServerMode.Maintenance && mode != ServerMode.Maintenance)
            {
                (server.IsDown, server.Until, server.Fails) = (false, 0, 0);
                server.Contrary = server.IsChecked ? settings.CheckFall - 1 : 0;
            }

            if (server.Mode != mode)
            {
                log.ServerState(RouteStats.Title, server.Title, mode);
                bool isBack = mode == ServerMode.Ready && !server.IsDown && _servers.Length > 1;
                (server.BackSince, server.Mode) = (isBack ? Environment.TickCount64 : 0, mode);
                server.Stats.Turned(isDown: false);
            }
        }

        Line.Serve();
    }

    internal void Weigh(Server server, int weight)
    {
        lock (_gate)
        {
            server.OwnWeight = weight;
            _table = [];
        }

        Line.Serve();
    }

    internal void Bound(Server server, int most)
    {
        server.OwnMaxConnections = most;
        Line.Serve();
    }
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
    private int _holding; // of them: who is not picky

    internal int Most { get; set; } = most;
    internal TimeSpan Patience { get; set; } = patience;
    internal int Count => _waiters.Count;

    /// <summary>Whoever comes now has to wait as well.</summary>
    internal bool IsHeldUp => Volatile.Read(ref _holding) > 0;

    /// <summary>Waits until <paramref name="tryEnter"/> has found room; it is called in order, and under the line's lock.
    /// Null then, else why not: a client that is reset, or ends without having sent anything, has left. One that
    /// <paramref name="hasSpoken"/> before may end and wait. One who <paramref name="isPicky"/> does not hold up those behind.
    /// Its log <paramref name="line"/> is told.</summary>
    internal Task<CloseReason?> EnterAsync(
        Func<bool> tryEnter, Socket? client, bool isPicky = false, bool hasSpoken = false, ConnectionLine? line = null)
    {
        lock (_waiters)
        {
            if (_waiters.Count >= Most)
            {
                bool hasRoom = _waiters.Count == 0 && tryEnter(); // as a reload may have made
                return Task.FromResult(hasRoom ? null : full);
            }

            Waiter waiter = new(this, tryEnter, client, isPicky, hasSpoken, line);
            waiter.Node = _waiters.AddLast(waiter);
            line?.Queued(_waiters.Count);
            _holding += isPicky ? 0 : 1;
            Sweep.Add(waiter);
            Serve(); // room that came just before it stood in line
            return waiter.Outcome.Task;
        }
    }

    /// <summary>Lets in who can be.</summary>
    internal void Serve()
    {
        if (_waiters.Count == 0)
        {
            return;
        }

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
            if (waiter.Node is { List: not null } node)
            {
                _waiters.Remove(node);
                _holding -= waiter.IsPicky ? 0 : 1;
                Sweep.Remove(waiter);
                waiter.Told?.Dequeued();
                waiter.Outcome.SetResult(reason);
            }
        }
    }

    internal sealed class Waiter(
        WaitingLine line, Func<bool> tryEnter, Socket? client, bool isPicky, bool hasSpoken, ConnectionLine? told) : Watched
    {
        private readonly long _deadline = Deadline(line.Patience);

        internal ConnectionLine? Told { get; } = told;
        internal Func<bool> TryEnter { get; } = tryEnter;
        internal bool IsPicky { get; } = isPicky;
        internal LinkedListNode<Waiter>? Node { get; set; } // its place
        internal TaskCompletionSource<CloseReason?> Outcome { get; } = new(TaskCreationOptions.RunContinuationsAsynchronously);

        internal override void Stop() => line.Remove(this, CloseReason.StoppedConnecting);

        internal override bool Check(long now)
        {
            bool hasLeft = client is not null && (hasSpoken ? SocketOptions.HasFailed(client) : SocketOptions.HasLeft(client));
            if (now >= _deadline || hasLeft)
            {
                line.Remove(this, hasLeft ? CloseReason.LeftQueue : CloseReason.QueueTimeout);
            }

            line.Serve(); // a server may be back, which nobody says
            return true;
        }
    }
}

/// <summary>The upstreams of a route: connects a client to one of their servers, and checks the servers.</summary>
internal sealed class UpstreamPool(
    UpstreamSettings[] upstreams, PoolSettings settings, ConnectSettings connect, RouteStats route, Log log,
    UpstreamPool? old = null)
{
    private const int WaitPause = 100; // ms between two attempts of --wait-for

    private readonly Resolver?[] _resolvers = Array.ConvertAll(upstreams, upstream => // null for what needs no look-up
        Resolver.For(upstream.Address, old?._resolvers ?? [], connect.Resolve, route.Title, log));
    private readonly Balancer?[] _balancers = // one, or one a port where ranges are mapped; made when needed
        new Balancer?[Array.Find(upstreams, upstream => upstream.Address.PortCount > 1)?.Address.PortCount ?? 1];
    private UpstreamPool? _old = old; // until it is in force
    private volatile bool _isChecking;

    /// <summary>From now on servers that the old one had as well go by its settings; checks begin.</summary>
    internal void PutInForce()
    {
        Array.ForEach(_resolvers, resolver => resolver?.Use(connect, route.Title));
        for (int i = 0; i < _balancers.Length && _old?._balancers.Length == _balancers.Length; i++)
        {
            _balancers[i] = _old._balancers[i];
            _balancers[i]?.Use(upstreams, _resolvers, settings, connect.Source, route);
        }

        _old = null;
        _isChecking = settings.Check > TimeSpan.Zero;
        _ = _isChecking ? CheckAllAsync() : null;
    }

    /// <summary>Connects to one server, or to the next when that fails: no more than --retries others.
    /// The log <paramref name="line"/> is told, and has the client's address for --balance source; its socket
    /// <paramref name="client"/> is looked at only to see whether it has left.</summary>
    internal async ValueTask<Connection> ConnectAsync(
        int portIndex, ConnectionLine? line = null, Socket? client = null, bool hasSpoken = false)
    {
        line?.Choosing();
        long deadline = Watched.Deadline(connect.Timeout); // of the first server, the look-up of its name included
        if (Array.Exists(_resolvers, resolver => resolver is { IsFresh: false }))
        {
            await Resolver.RefreshAsync(_resolvers, deadline);
        }

        Balancer balancer = BalancerOf(portIndex);
        ulong key = settings.Policy == Policy.Source ? Maglev.Hash(line?.Client) : 0;
        UpstreamSettings? only = upstreams.Length == 1 ? upstreams[0] : null;
        Connection last = new(only, failure: balancer.Servers.Length == 0 ? CloseReason.NotResolved : CloseReason.NoServer);
        List<Server>? tried = null;
        for (int retries = connect.Retries; ; deadline = Watched.Deadline(connect.Timeout))
        {
            bool isFull = balancer.Line.IsHeldUp && tried is null;
            Server? server = isFull ? null : balancer.TryTake(key, tried, Environment.TickCount64, out isFull);
            if (isFull)
            {
                (server, CloseReason? refusal) = await WaitAsync(balancer, key, tried, client, hasSpoken, line);
                last = tried is null ? new Connection(only, failure: refusal) : last;
                deadline = Watched.Deadline(connect.Timeout);
            }

            if (server is null)
            {
                return last;
            }

            line?.Tried(server.Stats);
            Server[]? racers = balancer.Racers(server, tried, Environment.TickCount64);
            last = await DialAsync(server, racers, deadline);
            if (last.Failure is not { IsWorthRetry: true })
            {
                return last;
            }

            (tried ??= []).AddRange(racers ?? [server]);
            if (!balancer.HasOther(server, tried) && retries-- == 0)
            {
                return last;
            }

            server.Stats.Retried();
        }
    }

    /// <summary>--wait-for: null when a server has answered, else why none did.</summary>
    internal static async Task<string?> WaitForAsync(UpstreamAddress address, TimeSpan timeout)
    {
        long deadline = Watched.Deadline(timeout);
        using Log silent = new(new LogSettings { Format = LogFormat.Off });
        ConnectSettings connect = new() { Timeout = TimeSpan.FromSeconds(1) };
        UpstreamPool pool = new([new UpstreamSettings(address)], new PoolSettings(), connect, new RouteStats(""), silent);
        Sweep.Start([connect.Timeout]);
        while (true)
        {
            Connection connection = await pool.ConnectAsync(0);
            connection.Socket?.Dispose();
            if (connection.Failure is null || Environment.TickCount64 >= deadline)
            {
                return connection.Failure is not { } failure ? null
                    : $"--wait-for: {address.Text} did not answer within {Units.Text(timeout)}: {failure.Words}";
            }

            await Task.Delay(WaitPause);
        }
    }

    /// <summary>--explain: the server that a client would get, as far as no name need be looked up.</summary>
    internal string Explain(EndPoint? client)
    {
        string names = upstreams[0].ServerNames is { } list ? $" for {string.Join(',', list)}" : "";
        string all = string.Join(", ", Array.ConvertAll(upstreams, upstream => upstream.Title
            + (upstream.Weight == 1 ? "" : $" weight={upstream.Weight}") + (upstream.IsBackup ? " backup" : "")));
        Server? server = Array.Exists(_resolvers, resolver => resolver is not null) ? null
            : BalancerOf(0).TryTake(Maglev.Hash(client), null, 0, out _);
        string why = settings.Policy == Policy.Source ? "by the client's address" : "while all are idle";
        string which = server is null ? "not known without a look-up" : $"{server.Title}, {why}";
        return $"server{names}: {(upstreams.Length == 1 ? all : $"{which}, of {all}")}";
    }

    /// <summary>Those there are now, of every port.</summary>
    internal List<Server> Servers()
    {
        List<Server> servers = [];
        for (int i = 0; i < _balancers.Length; i++)
        {
            servers.AddRange(BalancerOf(i).Servers);
        }

        return servers;
    }

    /// <summary>Adds its servers; returns how many clients wait for one.</summary>
    internal int Look(List<ServerStats> servers)
    {
        int waiting = 0;
        for (int i = 0; i < _balancers.Length; i++)
        {
            waiting += BalancerOf(i).Look(servers);
        }

        return waiting;
    }

    private Balancer BalancerOf(int portIndex)
    {
        ref Balancer? place = ref _balancers[_balancers.Length == 1 ? 0 : portIndex];
        if (Volatile.Read(ref place) is null)
        {
            Balancer made = new(upstreams, _resolvers, portIndex, settings, connect.Source, route, log);
            Interlocked.CompareExchange(ref place, made, null);
        }

        place!.Update();
        return place;
    }

    private static async Task<(Server? Server, CloseReason? Refusal)> WaitAsync(
        Balancer balancer, ulong key, List<Server>? tried, Socket? client, bool hasSpoken, ConnectionLine? line)
    {
        Server? server = null;
        CloseReason? refusal = await balancer.Line.EnterAsync(
            () => (server = balancer.TryTake(key, tried, Environment.TickCount64, out _)) is not null,
            client, tried is not null, hasSpoken, line);
        return (server, refusal);
    }

    /// <summary>Connects to a server in which a place has been taken, or to the first to answer of those beside it, which then
    /// has the place; it is given back when all fail.</summary>
    private async ValueTask<Connection> DialAsync(Server first, Server[]? racers, long deadline)
    {
        Server? winner = null;
        long began = Stopwatch.GetTimestamp();
        try
        {
            if (first.Targets.Length == 0)
            {
                return new Connection(first.Upstream, winner = first);
            }

            EndPoint[] targets = racers is null ? first.Targets : Array.ConvertAll(racers, racer => racer.Targets[0]);
            List<Dial>? losers = racers is null ? null : [];
            Dial dial = await Dialer.DialAsync(targets, connect.Source, deadline, losers);
            CloseReason? failure = await dial.Outcome;
            for (int i = 0; i < losers?.Count; i++)
            {
                Server loser = OwnerOf(racers!, losers[i]);
                loser.Balancer.Dialled(loser, await losers[i].Outcome, Environment.TickCount64);
            }

            Server last = racers is null ? first : OwnerOf(racers, dial);
            last.Balancer.Dialled(last, failure, Environment.TickCount64);
            if (failure is not null)
            {
                return new Connection(first.Upstream, failure: failure);
            }

            if (last != first)
            {
                Interlocked.Increment(ref last.Active);
            }

            return new Connection(first.Upstream, winner = last, dial);
        }
        finally
        {
            winner?.Stats.Connected(Stopwatch.GetElapsedTime(began), Volatile.Read(ref winner.Active));
            if (winner != first)
            {
                first.Leave();
            }
        }

        static Server OwnerOf(Server[] racers, Dial dial) => Array.Find(racers, racer => racer.Targets[0] == dial.Target)!;
    }

    // ---- active checks

    internal void StopChecks() => _isChecking = false;

    /// <summary>Begins to check each server, now and whenever the look-up of a name has found new ones.</summary>
    private async Task CheckAllAsync()
    {
        do
        {
            await Resolver.RefreshAsync(_resolvers, Watched.Deadline(connect.Timeout));
            Servers().FindAll(server => server.Targets.Length > 0 && server.Checker != this).ForEach(
                server => _ = CheckAsync(server));
            await Task.Delay(settings.Check);
        }
        while (_isChecking && Array.Exists(_resolvers, resolver => resolver is not null));
    }

    private async Task CheckAsync(Server server)
    {
        int interval = (int)settings.Check.TotalMilliseconds;
        server.Checker = this;
        await Task.Delay(Random.Shared.Next(interval));
        while (_isChecking && server.Checker == this && Array.IndexOf(server.Balancer.Servers, server) >= 0)
        {
            bool isLookedAt = server.Mode != ServerMode.Maintenance;
            CloseReason? failure = isLookedAt ? await ProbeAsync(server) : null;
            if (_isChecking && isLookedAt)
            {
                server.Balancer.Checked(server, failure, Environment.TickCount64);
            }

            await Task.Delay(interval - (interval / 10) + Random.Shared.Next((interval / 5) + 1));
        }

        server.Checker = server.Checker == this ? null : server.Checker;
    }

    private async Task<CloseReason?> ProbeAsync(Server server)
    {
        long deadline = Math.Min(Watched.Deadline(connect.Timeout), Watched.Deadline(settings.Check));
        Dial dial = await Dialer.DialAsync(server.Targets, connect.Source, deadline);
        if (await dial.Outcome is { } failure)
        {
            return failure;
        }

        using Socket socket = dial.Socket!;
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
        byte[] words = new byte[ProxyHeader.LongestWritten + settings.CheckSend.Length];
        int length = connect.SendProxy == ProxyVersion.Off ? 0 : ProxyHeader.Write(words, connect.SendProxy, null, null);
        settings.CheckSend.CopyTo(words, length);
        length += settings.CheckSend.Length;
        if (length > 0)
        {
            await socket.SendAsync(words.AsMemory(0, length), SocketFlags.None);
        }

        byte[] answer = new byte[settings.CheckExpect.Length > 0 ? Longest : 0];
        int received = 0;
        for (length = 0; answer.AsSpan(0, length).IndexOf(settings.CheckExpect) < 0; length += received)
        {
            received = length < answer.Length ? await socket.ReceiveAsync(answer.AsMemory(length), SocketFlags.None) : 0;
            if (received == 0)
            {
                return false;
            }
        }

        return true;
    }
}

// == 8  CONNECT =====================================================================================================
// From a name to a connected socket: look-ups that nobody else waits for, and all addresses tried (RFC 8305).

internal sealed class ConnectSettings
{
    internal TimeSpan Timeout { get; set; } // for one server; zero = the operating system's
    internal int Retries { get; set; }
    internal TimeSpan Resolve { get; set; }
    internal IPAddress? Source { get; set; }
    internal ProxyVersion SendProxy { get; set; }

    internal ConnectSettings Clone() => (ConnectSettings)MemberwiseClone();
}

/// <summary>The addresses of one name, looked up when needed, by one look-up at a time, and kept for a while.</summary>
internal sealed class Resolver(string host, TimeSpan keep, string route, Log log)
{
    private const int Moment = 250; // ms: how long a connection waits for a look-up that it could do without
    private const int LeastPause = 1000; // ms from one look-up to the next, whatever fails

    private static int _changes;

    private readonly Lock _gate = new();
    private readonly string _host = host;
    private volatile IPAddress[] _addresses = [];
    private Task? _lookup; // the one that runs; under _gate
    private long _askedAt;
    private long _answeredAt;
    private long _freshUntil = long.MinValue;

    /// <summary>Of all names: how often their addresses have.</summary>
    internal static int Changes => Volatile.Read(ref _changes);

    /// <summary>The last known ones.</summary>
    internal IPAddress[] Addresses => _addresses;

    /// <summary>The last look-up did, and there are no addresses from before.</summary>
    internal bool HasFailed => _addresses.Length == 0 && Volatile.Read(ref _answeredAt) > 0;

    internal bool IsFresh => Environment.TickCount64 < Volatile.Read(ref _freshUntil);

    internal void Use(ConnectSettings settings, string title) => (keep, route) = (settings.Resolve, title);

    /// <summary>The one of <paramref name="old"/> for the name, or a new one. Null for what needs no look-up.</summary>
    internal static Resolver? For(UpstreamAddress address, Resolver?[] old, TimeSpan keep, string route, Log log) =>
        address.Kind != AddressKind.Tcp || Known(address.Host) is not null ? null
        : Array.Find(old, one => one?._host == address.Host) ?? new Resolver(address.Host, keep, route, log);

    /// <summary>What needs no look-up, or null.</summary>
    internal static IPAddress[]? Known(string host) => IPAddress.TryParse(host, out IPAddress? literal) ? [literal]
        : host == "localhost" ? [IPAddress.Loopback, IPAddress.IPv6Loopback] // RFC 6761, 6.3
        : null;

    /// <summary>Looks up what is not fresh. Where addresses are known (null: without looking), they serve when an answer takes
    /// longer than a moment.</summary>
    internal static async Task RefreshAsync(Resolver?[] resolvers, long deadline)
    {
        List<Task> lookups = [];
        long asked = 0;
        foreach (Resolver? resolver in resolvers)
        {
            if (resolver is { IsFresh: false })
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

        bool IsKnown() => Array.Exists(resolvers, resolver => resolver is not { _addresses.Length: 0 });
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
            found = Interleave([.. await Task.Factory.StartNew(() => Dns.GetHostAddresses(_host),
                CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default)], ip => ip.AddressFamily);
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
            Interlocked.Add(ref _changes, isSame ? 0 : 1);
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
            log.Event(LogLevel.Warn, "resolve", $"{_host}: {failure}{serves}", route);
        }
        else if (!isSame)
        {
            log.Event(_addresses.Length == 0 ? LogLevel.Debug : LogLevel.Info, "resolve",
                $"{_host} is {string.Join(' ', (object[])found)}", route);
        }
    }

    /// <summary>RFC 8305, 4: the families in turn, beginning with that of the resolver's first choice (RFC 6724).</summary>
    internal static T[] Interleave<T>(List<T> items, Converter<T, AddressFamily> family)
        where T : class
    {
        List<T> second = items.FindAll(item => family(item) != family(items[0]));
        List<T> first = items.FindAll(item => !second.Contains(item));
        for (int i = 0; i < second.Count; i++)
        {
            first.Insert(Math.Min((2 * i) + 1, first.Count), second[i]);
        }

        return [.. first];
    }
}

/// <summary>One attempt to connect to one address. Its socket is the caller's when it succeeds, else closed.</summary>
internal sealed class Dial : Patience
{
    /// <summary>Begins at once.</summary>
    internal Dial(EndPoint target, IPAddress? source, long deadline)
        : base(null, deadline, CloseReason.StoppedConnecting)
    {
        Target = target;
        Outcome = ConnectAsync(source);
    }

    internal EndPoint Target { get; }

    /// <summary>Null when connected, else why not.</summary>
    internal Task<CloseReason?> Outcome { get; }

    private async Task<CloseReason?> ConnectAsync(IPAddress? source)
    {
        bool isUnix = Target.AddressFamily == AddressFamily.Unix;
        if (!isUnix && source is not null && source.AddressFamily != Target.AddressFamily)
        {
            return CloseReason.WrongFamily;
        }

        try
        {
            Socket = new(Target.AddressFamily, SocketType.Stream, isUnix ? ProtocolType.Unspecified : ProtocolType.Tcp);
            if (!isUnix)
            {
                SocketOptions.Relay(Socket);
                SocketOptions.BindSource(Socket, source);
            }

            ValueTask connecting = Socket.ConnectAsync(Target, CancellationToken.None);
            if (!connecting.IsCompleted)
            {
                Sweep.Add(this);
            }

            await connecting;
            if (IsLoop(Socket))
            {
                throw new SocketException((int)SocketError.ConnectionRefused);
            }

            return Done(); // or the sweep was first
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            Socket?.Dispose();
            return Done() ?? CloseReason.OfConnect(e);
        }
    }

    /// <summary>Where nobody listens, a connect to an own port that the system picks for its near end as well succeeds:
    /// TCP's simultaneous open with itself.</summary>
    private bool IsLoop(Socket socket) =>
        Target is IPEndPoint ip && IPAddress.IsLoopback(ip.Address) && Target.Equals(socket.LocalEndPoint);

    /// <summary>Another was faster, perhaps by so little that this one has succeeded as well.</summary>
    internal void Lose()
    {
        End(CloseReason.Outrun);
        Socket?.Close(0);
    }
}

internal static class Dialer
{
    private const int AttemptDelay = 250; // ms: RFC 8305, 5, Connection Attempt Delay

    /// <summary>Connects to the first of <paramref name="targets"/> that answers; the one deadline is for all. Returns that
    /// attempt, or else the last one. The others that have failed are added to <paramref name="losers"/>, those that
    /// were not waited for are not.</summary>
    internal static async ValueTask<Dial> DialAsync(
        EndPoint[] targets, IPAddress? source, long deadline, List<Dial>? losers = null)
    {
        if (targets.Length > 1)
        {
            return await RaceAsync(targets, source, deadline, losers ?? []);
        }

        Dial dial = new(targets[0], source, deadline);
        await dial.Outcome;
        return dial;
    }

    /// <summary>RFC 8305: the next address is tried when the last one failed or has not answered for a while; the
    /// first to connect wins and the others are closed.</summary>
    private static async Task<Dial> RaceAsync(EndPoint[] targets, IPAddress? source, long deadline, List<Dial> losers)
    {
        List<Dial> running = [];
        for (int next = 0; next < targets.Length || running.Count > 0;)
        {
            if (next < targets.Length)
            {
                running.Add(new Dial(targets[next++], source, deadline));
            }

            if (!running[^1].Outcome.IsCompleted)
            {
                Task end = Task.WhenAny(running.ConvertAll(Task (dial) => dial.Outcome));
                await (next < targets.Length ? end.WaitAsync(TimeSpan.FromMilliseconds(AttemptDelay)) : end)
                    .ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing); // the time-out is no error: the next starts
            }

            for (int i = running.Count - 1; i >= 0; i--)
            {
                Dial dial = running[i];
                if (dial.Outcome.IsCompleted)
                {
                    running.RemoveAt(i);
                    if (await dial.Outcome is null)
                    {
                        running.ForEach(loser => loser.Lose());
                        losers.AddRange(running.GetRange(0, i)); // those before it have had their delay, and kept silent
                        return dial;
                    }

                    losers.Add(dial);
                }
            }
        }

        Dial last = losers[^1];
        losers.Remove(last);
        return last;
    }
}

// == 9  BRIDGE ======================================================================================================
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
    internal Log? Log { get; set; } // where a long connection is told

    /// <summary>How long the answer to the last bytes of a quota may keep silent.</summary>
    internal TimeSpan QuotaGrace =>
        FinTimeout > TimeSpan.Zero && FinTimeout < TimeSpan.FromSeconds(1) ? FinTimeout : TimeSpan.FromSeconds(1);

    /// <summary>The quota of the pump from the client. What echo gets it also gives, so the lesser of two holds.</summary>
    internal long QuotaUp(bool isEcho) => IsDownFirst(isEcho) ? MaxBytesDown : MaxBytesUp;

    internal bool IsDownFirst(bool isEcho) => isEcho && MaxBytesDown > 0 && (MaxBytesUp == 0 || MaxBytesDown < MaxBytesUp);

    internal BridgeSettings Clone() => (BridgeSettings)MemberwiseClone();
}

/// <summary>The rates of a route at run time: buckets of its own, which its connections share.</summary>
internal sealed class Rates(BridgeSettings settings, Rates? old = null)
{
    private readonly ByteRate[] _up = ByteRate.Of(settings.RateTotalUp, old?._up);
    private readonly ByteRate[] _down = ByteRate.Of(settings.RateTotalDown, old?._down);

    /// <summary>Buckets that older connections share as well get its rates.</summary>
    internal void PutInForce()
    {
        Array.ForEach(_up, bucket => bucket.Rate = settings.RateTotalUp);
        Array.ForEach(_down, bucket => bucket.Rate = settings.RateTotalDown);
    }

    /// <summary>For the pump from the client of a new connection. What echo gets it also gives.</summary>
    internal Throttle? Up(Socket client, bool isEcho) => Throttle.Of(client, [.. ByteRate.Of(settings.RateUp), .. _up,
        .. isEcho ? ByteRate.Of(settings.RateDown) : [], .. isEcho ? _down : []]);

    internal Throttle? Down(Socket upstream) => Throttle.Of(upstream, [.. ByteRate.Of(settings.RateDown), .. _down]);
}

internal abstract class Bridge : PumpOwner, ISession
{
    private const int ProbeAge = 5000; // ms: a younger connection is not worth the system calls of keep-alive
    private const int StalledFor = 1000; // ms without progress before a socket that nobody reads is looked at

    private readonly Socket _client; // owned; closed by Close
    private readonly Socket? _upstream; // owned; closed by Close; null for the built-in servers
    private readonly BridgeSettings _settings;
    private readonly Pump _up;
    private readonly Pump? _down; // null for the built-in servers: one pump is all they are
    private readonly bool _isEcho; // what comes from the client counts both ways
    private readonly long _startedAt = Environment.TickCount64;
    private CloseReason? _reason; // rule 4
    private int _references; // rule 3

    // the sweep's own: nobody else touches them
    private long _progress;
    private long _quietSince = Environment.TickCount64;
    private long _unsent = -1; // bytes in the kernel's send queues when half of the limit had passed
    private bool _isProbed;

    /// <summary>As many bytes of the client as the line says have already passed.</summary>
    protected Bridge(
        ConnectionLine line, Socket client, Socket? upstream, AddressKind kind, BridgeSettings settings, Rates? rates,
        Conversation? taps)
    {
        (Line, _client, _upstream, _settings, _isEcho) = (line, client, upstream, settings, kind == AddressKind.Echo);
        _up = new Pump(client, _isEcho ? client : upstream, settings.BufferSize, settings.IsSplicing,
            settings.QuotaUp(_isEcho), line.BytesUp, rates?.Up(client, _isEcho), taps?.Up);
        _down = upstream is null ? null
            : new Pump(upstream, client, settings.BufferSize, settings.IsSplicing, settings.MaxBytesDown, 0,
                rates?.Down(upstream), taps?.Down);
        _references = _down is null ? 1 : 2;
        client.Blocking = false;
        upstream?.Blocking = false;
        if (!Libc.IsThere && client.AddressFamily != AddressFamily.Unix)
        {
            SocketOptions.Relay(client); // on Linux an accepted socket has it from its listener
        }
    }

    public ConnectionLine Line { get; }
    public long BytesUp => _up.Bytes;
    public long BytesDown => _down is not null ? _down.Bytes : _isEcho ? _up.Bytes : 0;

    internal void Start()
    {
        Sweep.Add(this);
        _ = _up.RunAsync(this);
        _ = _down?.RunAsync(this);
    }

    /// <summary>Both pumps have ended, and the sockets are closed.</summary>
    protected abstract void Ended(CloseReason reason);

    /// <summary>(7) Passes FIN on. After an end that was not orderly there is none to pass: the last release resets.</summary>
    internal override void Finished(Pump pump, PumpEnd end)
    {
        if (end == PumpEnd.Quota)
        {
            bool isUp = pump == _up && !_settings.IsDownFirst(_isEcho);
            Interlocked.CompareExchange(ref _reason, isUp ? CloseReason.QuotaUp : CloseReason.QuotaDown, null);
        }

        // the second of two clean ends needs no system call of its own: closing sends the FIN
        bool isLast = end == PumpEnd.Source && _reason is null && Volatile.Read(ref _references) == 1;
        if (!isLast && (_reason is null || _reason.IsOrderly))
        {
            SocketOptions.ShutDown(pump.Target, SocketShutdown.Send);
        }
    }

    /// <summary>An error has a culprit: the source when it was received from, else the target.</summary>
    internal override void Failed(Pump pump, Exception error, bool isSending)
    {
        if (error is OperationCanceledException && _reason is not null)
        {
            return; // a tap's wait is over because the connection is
        }

        if (error is TapException { Reason.IsOrderly: true } end)
        {
            // a socket that is closed while something pends on it sends an RST: the pumps end first, and close by it
            Interlocked.CompareExchange(ref _reason, end.Reason, null);
            SocketOptions.ShutDown(_client, SocketShutdown.Both);
            SocketOptions.ShutDown(_upstream, SocketShutdown.Both);
            Cancel();
            return;
        }

        if (error is not (SocketException or ObjectDisposedException))
        {
            Abort((error as TapException)?.Reason ?? CloseReason.Unexpected(error)); // the other pump must not go on alone
            return;
        }

        bool isClient = (isSending ? pump.Target : pump.Source) == _client;
        CloseReason reason = isClient ? CloseReason.ClientReset : CloseReason.UpstreamReset;
        if (isSending)
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
            Ended(_reason!);
        }
    }

    /// <summary>Closes both sockets for the first reason that was given; whatever pends on them ends. What a quota has let go on
    /// and something else cuts off must not look whole, though.</summary>
    protected void Abort(CloseReason reason)
    {
        CloseReason first = Interlocked.CompareExchange(ref _reason, reason, null) ?? reason;
        bool isCut = !reason.IsOrderly && (first == CloseReason.QuotaUp || first == CloseReason.QuotaDown);
        Close(_client, first.IsOrderly && !(isCut && _down is { IsFinished: false }));
        Close(_upstream, first.IsOrderly && !(isCut && !_up.IsFinished));
        Cancel();

        static void Close(Socket? socket, bool isOrderly)
        {
            if (isOrderly)
            {
                socket?.Dispose();
            }
            else
            {
                socket?.Close(0); // linger zero: a reset
            }
        }
    }

    private void Cancel()
    {
        _up.Cancel();
        _down?.Cancel();
    }

    // ---- timeouts: called by the sweep, one to forty times a second

    internal override void Stop() => Abort(CloseReason.Shutdown);

    /// <summary>An administrator ends it.</summary>
    internal void ShutDown() => Abort(CloseReason.ShutDown);

    /// <summary>For how long the sweep has seen nothing move.</summary>
    internal TimeSpan Quiet => TimeSpan.FromMilliseconds(Math.Max(0, Environment.TickCount64 - _quietSince));

    internal override bool Check(long now)
    {
        if (_settings.Log is { } log && log.IsDue(now, _startedAt) && _reason is null)
        {
            log.Write(Line.Early(BytesUp, BytesDown));
        }

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

    /// <summary>Always the same for this bridge: the runtime's hash of it is 26 random bits, which costs no field.</summary>
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
        // a FIN is progress as well
        long progress = ((_up.Progress + (_down?.Progress ?? 0)) << 2) + Volatile.Read(ref _references);
        bool hasMoved = progress != _progress;
        if (hasMoved)
        {
            (_progress, _quietSince, _unsent) = (progress, now, -1);
        }

        long quiet = now - _quietSince;
        if (quiet >= StalledFor || _up.IsTapped || _down is { IsTapped: true }) // a tap may make a little progress for long
        {
            CheckStalled(_up, CloseReason.ClientReset);
            CheckStalled(_down, CloseReason.UpstreamReset);
        }

        (TimeSpan limit, CloseReason reason) = Limit();
        if (hasMoved || limit == TimeSpan.Zero || quiet < limit.TotalMilliseconds / 2)
        {
            return hasMoved;
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

// == 10  PUMP =======================================================================================================
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

    internal abstract void Failed(Pump pump, Exception error, bool isSending);

    internal abstract void Release();
}

internal sealed class Pump(
    Socket source, Socket? target, int bufferSize, bool isSplicing, long quota, long passed, Throttle? throttle, TapLine? taps)
{
    private const int StreamAfter = 4; // full buffers in a row make a stream
    private const int Message = 16 << 10; // bytes; more may well fill the target, and then a first try costs one call more
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
    internal bool IsTapped => taps is not null;

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
            PumpEnd end = _left == 0 ? PumpEnd.Quota : taps is not null ? await RunTappedAsync(taps, owner) : PumpEnd.NotYet;
            int full = 0; // buffers in a row
            while (end == PumpEnd.NotYet)
            {
                int most = full < StreamAfter ? bufferSize : StreamFactor * bufferSize;
                int length = await (throttle is null ? ReceiveAsync(most) : ReceiveThrottledAsync(throttle));
                if (length > 0 && Target is not null)
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
                if (full >= StreamAfter && end == PumpEnd.NotYet && isSplicing && Pipe.IsUsable && Target is not null)
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
            owner.Failed(this, e, IsSending);
        }
        finally
        {
            _buffer.GiveBack();
            owner.Release();
        }
    }

    /// <summary>The same through taps, and what was read before there was a pump as well.</summary>
    private async Task<PumpEnd> RunTappedAsync(TapLine taps, PumpOwner owner)
    {
        taps.Start(
            error =>
            {
                IsSending = true;
                owner.Failed(this, error, isSending: true);
            },
            () =>
            {
                IsFinished = true;
                owner.Finished(this, PumpEnd.Tap);
            });
        PumpEnd end = PumpEnd.NotYet;
        if (taps.Spoken.Length > 0)
        {
            await WriteAsync(taps.Spoken);
            end = Count(taps.Spoken.Length);
        }

        int full = 0;
        while (end == PumpEnd.NotYet)
        {
            int most = full < StreamAfter ? bufferSize : StreamFactor * bufferSize;
            int length = await (throttle is null ? ReceiveAsync(most) : ReceiveThrottledAsync(throttle));
            if (length > 0)
            {
                await WriteAsync(_buffer.Received(length));
            }

            end = Count(length);
            full = length < bufferSize ? 0 : full + 1;
            if (IsTurnOver())
            {
                _buffer.GiveBack();
                await EventLoop.TurnAsync();
            }
        }

        IsSending = true;
        await taps.First.FinishAsync();
        IsSending = false;
        return end;

        async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
        {
            IsSending = true;
            taps.Ending.ThrowIfCancellationRequested();
            await taps.First.WriteAsync(bytes);
            IsSending = false;
        }
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
    private async Task DiscardAsync()
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
internal sealed class Throttle(Socket source, ByteRate[] rates) : IValueTaskSource<int>
{
    private ManualResetValueTaskSourceCore<int> _wait = new() { RunContinuationsAsynchronously = true };
    private int _wanted;

    internal static Throttle? Of(Socket source, ByteRate[] rates) => rates.Length == 0 ? null : new Throttle(source, rates);

    /// <summary>Takes up to <paramref name="most"/> bytes, when it is time; 0 where the source is closed meanwhile.</summary>
    internal async ValueTask<int> TakeAsync(int most)
    {
        for (int i = 0; i < rates.Length; i++)
        {
            int taken = await rates[i].TakeAsync(this, most);
            GiveBack(most - taken, i);
            most = taken;
        }

        return most;
    }

    internal void GiveBack(int bytes) => GiveBack(bytes, rates.Length);

    /// <summary>How much it waits for in the line of a bucket, in which it stands from now on.</summary>
    internal int Wanted => source.SafeHandle.IsClosed ? 0 : _wanted;

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
            rates[i].GiveBack(bytes);
        }
    }
}

/// <summary>A token bucket: so many bytes a second, given out in slices of 10 ms in the order of the line,
/// so that those who share it have equal parts. It holds what comes in 50 ms, which makes up for a late wake-up.</summary>
internal sealed class ByteRate(long rate)
{
    private const int Slices = 100; // a second
    private const int Depths = 20; // a second
    private const int Least = 4 << 10; // bytes that are worth their system calls

    private readonly List<Throttle> _line = []; // under itself, as all below it
    private double _bytes;
    private long _filledAt = Stopwatch.GetTimestamp();

    internal long Rate { get; set; } = rate;

    /// <summary>None where there is no bound.</summary>
    internal static ByteRate[] Of(long rate, ByteRate[]? old = null) => rate == 0 ? [] : old is [_] ? old : [new ByteRate(rate)];

    internal ValueTask<int> TakeAsync(Throttle throttle, int most)
    {
        lock (_line)
        {
            // many get little at a time: what waits at a source may be less than a buffer, and who has more would have the
            // larger part
            long slice = Math.Max(1, Rate / Slices);
            int wanted = (int)Math.Min(most, Math.Min(slice, Math.Max(Least, slice / (_line.Count + 1))));
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
                int wanted = (int)Math.Min(throttle.Wanted, Math.Max(1, Rate / Slices)); // a reload may have lowered it meanwhile
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
        double most = Math.Max(1, (double)Rate / Depths);
        _bytes = Math.Min(most, _bytes + ((double)(now - _filledAt) / Stopwatch.Frequency * Rate));
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

// == 11  TAPS =======================================================================================================
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

    /// <summary>What is open for the one serves the other.</summary>
    internal virtual bool Is(TapSettings other) => other == this;
}

/// <summary>A tap ends the connection, with a FIN to both sides if <paramref name="isOrderly"/>, else with a reset.</summary>
#pragma warning disable CA1032 // nobody throws it without words
internal sealed class TapException(string words, bool isOrderly = false) : Exception(words)
#pragma warning restore CA1032
{
    internal CloseReason Reason { get; } = new("PD", words, isOrderly, kind: words.Split(' ')[0]);
}

/// <summary>A stage of one direction. Its pump calls it, one call at a time; what it does in its own time besides, it keeps
/// apart from that, and reports to <see cref="TapLine.Fail"/> when it throws. Waits end by the token of the line.</summary>
internal abstract class Tap
{
    internal Tap Next { get; set; } = null!; // the last one is a Delivery, which needs none
    internal TapLine Line { get; set; } = null!; // the one it stands in: of the echo server there is one for both directions

    /// <summary>The bridge stands: from now on the tap may fail in its own time.</summary>
    internal virtual void Start()
    {
    }

    /// <summary>There are some. They are the caller's again when this is done.</summary>
    internal abstract ValueTask WriteAsync(ReadOnlyMemory<byte> bytes);

    /// <summary>No more bytes will come. When this is done, the target gets its FIN.</summary>
    internal virtual ValueTask FinishAsync() => Next.FinishAsync();

    /// <summary>The connection is over.</summary>
    internal virtual void End(CloseReason reason)
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

    internal Tap First => _taps[0];

    /// <summary>What a tap did in its own time has failed.</summary>
    internal Action<Exception> Fail { get; private set; } = _ => { };

    /// <summary>A tap lets nothing more through: the target gets its FIN before the source has finished.</summary>
    internal Action Finish { get; private set; } = () => { };

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
        for (int i = 0; i + 1 < _taps.Count; i++)
        {
            (_taps[i].Line, _taps[i].Next) = (this, _taps[i + 1]);
        }

        return this;
    }

    internal void Start(Action<Exception> failed, Action finished)
    {
        (Fail, Finish) = (failed, finished);
        _taps.ForEach(tap => tap.Start());
    }

    /// <summary>Waits until <see cref="Stopwatch"/> says so: never less, up to 5 ms more as timers are.</summary>
    internal async ValueTask UntilAsync(long time)
    {
        const int Day = 86_400_000; // ms: more than the timers can count may be asked for
        while (time - Stopwatch.GetTimestamp() is long left and > 0)
        {
            await Task.Delay((int)Math.Min(Day, 1 + (left / (Stopwatch.Frequency / 1000))), Ending);
        }
    }

    internal ValueTask DelayAsync(long ticks) => UntilAsync(Stopwatch.GetTimestamp() + ticks);

    /// <summary>Ends the connection after that time; if it has ended before, the task is cancelled.</summary>
    internal async Task EndAfterAsync(long ticks, TapException end)
    {
        await DelayAsync(ticks);
        Fail(end);
    }

    /// <summary>Until the end of the connection.</summary>
    internal ValueTask ForEverAsync() => new(Task.Delay(Timeout.Infinite, Ending));

    internal void Cancel() => _ending.Cancel();

    internal void End(CloseReason reason)
    {
        _ending.Cancel();
        _taps.ForEach(tap => tap.End(reason));
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
internal sealed class Conversation(
    string route, EndPoint? client, EndPoint? upstream, bool isEcho, TimeSpan finTimeout, long seed, long number)
{
    private readonly TapLine _up = new();
    private readonly TapLine _down = new();
    private int _toxics; // it might have met so far

    internal string RouteTitle { get; } = route;
    internal EndPoint? Client { get; } = client;
    internal EndPoint? Upstream { get; } = upstream; // null for the built-in ones
    internal bool IsEcho { get; } = isEcho;
    internal TimeSpan FinTimeout { get; } = finTimeout; // zero = off

    /// <summary>Null where that direction has no taps.</summary>
    internal TapLine? Up { get; private set; }
    internal TapLine? Down { get; private set; }

    internal void Begin(List<TapSettings> taps, Socket client, Socket? server)
    {
        taps.ForEach(tap => tap.AddTo(this));
        if (IsEcho)
        {
            _up.AddRange(_down);
        }

        Up = _up.To(IsEcho ? client : server);
        Down = server is null ? null : _down.To(client);
    }

    internal TapLine LineOf(bool isUp) => isUp ? _up : _down;

    /// <summary>Of the next toxic.</summary>
    internal Chance NextChance() => new(seed, number, _toxics++);

    internal void End(CloseReason reason)
    {
        Up?.End(reason);
        Down?.End(reason);
    }
}

// ---- dump: what passes, on stderr, as socat's -v and -x show it (xiotransfer.c of 1.7.4), but that a block always ends its
// last line. Blocks and log lines have one writer; a reader of stderr that is too slow misses blocks and holds up nobody.

internal sealed class DumpSettings : TapSettings
{
    private Log? _log;
    private bool _isColoured;

    internal int Format { get; set; } // of off, text, hex
    internal long Limit { get; set; } // bytes of a connection; 0 = off

    internal DumpSettings Clone() => (DumpSettings)MemberwiseClone();

    internal override void Open(Log log) => (_log, _isColoured) = (log, Libc.IsThere && Libc.IsTerminal(StandardStream.Error) == 1
        && string.IsNullOrEmpty(Environment.GetEnvironmentVariable("NO_COLOR"))); // https://no-color.org

    internal override void AddTo(Conversation conversation)
    {
        StrongBox<long>? left = Limit == 0 ? null : new StrongBox<long>(Limit);
        string end = $"-- the rest of {Text.Of(conversation.Client)} is left out: --dump-limit\n";
        conversation.LineOf(isUp: true).Add(new DumpTap(_log!, Format == 2, left, end, _isColoured ? "\e[36m>" : ">")); // cyan
        conversation.LineOf(isUp: false).Add(new DumpTap(_log!, Format == 2, left, end, _isColoured ? "\e[33m<" : "<")); // yellow
    }
}

/// <summary>Shows what is <paramref name="left"/> of the limit, which both directions share.</summary>
internal sealed class DumpTap(Log log, bool isHex, StrongBox<long>? left, string end, string mark) : Tap
{
    private long _offset;

    internal override ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        long most = left is null ? long.MaxValue : Interlocked.Add(ref left.Value, -bytes.Length) + bytes.Length;
        int length = (int)Math.Clamp(most, 0, bytes.Length);
        bool isEnd = most >= 0 && most < bytes.Length;
        if (length > 0 || isEnd)
        {
            byte[] copy = ArrayPool<byte>.Shared.Rent(length); // rule 2: the block's, if there is room for it
            bytes.Span[..length].CopyTo(copy);
            if (!log.Write(new DumpBlock(copy, length, _offset, isHex, mark, isEnd ? end : "")))
            {
                ArrayPool<byte>.Shared.Return(copy);
            }
        }

        _offset += bytes.Length;
        return Next.WriteAsync(bytes);
    }
}

internal sealed class DumpBlock(byte[] bytes, int length, long offset, bool isHex, string mark, string end)
    : LogLine(LogLevel.Error)
{
    internal override int Shown => Math.Max(length, 1);

    internal override void Format(LogText text)
    {
        string time = Text.Of(Time)[..19].Replace('-', '/').Replace('T', ' ');
        string micros = (Time.Ticks / TimeSpan.TicksPerMicrosecond % 1_000_000).ToString("d6", CultureInfo.InvariantCulture);
        text.Append(length == 0 ? ""
            : $"{mark} {time}.{micros}  length={Text.Of(length)} from={Text.Of(offset)} to={Text.Of(offset + length - 1)}\n");
        Span<byte> room = text.Room((3 * length) + 1);
        int at = 0;
        foreach (byte b in bytes.AsSpan(0, length))
        {
            int escape = "\a\b\v\f\r\\"u8.IndexOf(b);
            ReadOnlySpan<byte> shown = isHex ? [(byte)' ', "0123456789abcdef"u8[b >> 4], "0123456789abcdef"u8[b & 15]]
                : escape >= 0 ? [(byte)'\\', "abvfr\\"u8[escape]] : [b is (>= 32 and <= 126) or 9 or 10 ? b : (byte)'.'];
            shown.CopyTo(room[at..]);
            at += shown.Length;
        }

        text.Grow(at);
        text.Append(at == 0 || room[at - 1] == '\n' ? "" : "\n");
        text.Append(mark.Length > 1 && at > 0 ? $"\e[m{end}" : end);
        ArrayPool<byte>.Shared.Return(bytes);
    }
}

// ---- spool: how record and pcap write. No event loop may wait for a file (rule 6), so an option has one thread for all of its:
//
//     Tap  --- RoomAsync, Add --->  Spool  ------>  SpoolFile
//
// What waits for it is bounded, and a pump waits for room as for a slow target. A disk that is full, or does nothing for 5 s,
// ends what was being written: there, without a hole, and never the connection.

/// <summary>A file that the spool's thread opens with the first of its bytes, and closes; stdout where there is none to
/// <paramref name="open"/>.</summary>
internal sealed class SpoolFile(Func<FileStream>? open, Action<string?> say, StrongBox<bool>? failed = null)
{
    private const int Ahead = 4 << 20; // bytes that a large file reserves, which makes it cheaper to write them

    private readonly StrongBox<bool> _failed = failed ?? new StrongBox<bool>();
    private readonly int _slice = open is null ? 64 << 10 : 256 << 10;
    private FileStream? _stream; // owned; disposed by Close
    private long _written;
    private long _reserved;
    private bool _isOver;

    /// <summary>Nothing more is added; nor written, if that has failed here or in a file before this one.</summary>
    internal bool IsOver { get => _isOver || HasFailed; set => _isOver = value; }
    internal bool HasFailed { get => _failed.Value; private set => _failed.Value = value; }

    /// <summary>Tells why there is no more of it: null when the disk does nothing.</summary>
    internal Action<string?> Say { get; } = say;

    /// <summary>How much of a file is worth keeping when its last write has failed halfway; null = all.</summary>
    internal Func<FileStream, long>? Whole { get; init; }

    /// <summary>Bytes to the next multiple of it in the file: to write from one to the next takes half the time.</summary>
    internal int LeftOfSlice => _slice - (int)(_written % _slice);

    internal void Open() => _stream ??= open?.Invoke();

    /// <summary>Null when it is done, else why it never will be.</summary>
    internal string? Write(ReadOnlySpan<byte> bytes)
    {
        try
        {
            Open();
            if (_stream is { CanSeek: true } && _written >= Ahead && _written + bytes.Length > _reserved)
            {
                _reserved = _written + Ahead;
                Libc.Reserve(_stream.SafeFileHandle, _written, Ahead);
            }

            _stream?.Write(bytes);
            HasFailed = _stream is null && !StandardStream.TryWrite(StandardStream.Output, bytes);
            _written += bytes.Length;
            return HasFailed ? "nobody reads it" : null;
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            HasFailed = true;
            Close();
            return Text.Reason(e);
        }
    }

    internal void Close()
    {
        try
        {
            if (_stream is { CanSeek: true } && (HasFailed || _reserved > 0))
            {
                // gives back what is reserved
                _stream.SetLength(HasFailed && Whole is not null ? Whole(_stream) : _stream.Length);
            }
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            // a device, which has no length
        }

        _stream?.Dispose();
        _stream = null;
    }
}

/// <summary>The bytes that wait to be written, of all files of an option, in the order in which they came.</summary>
internal sealed class Spool(string name)
{
    private const int Size = 4 << 20; // bytes
    private const int Most = 3 << 20; // of them for those who can wait
    private const int Enough = 1 << 20; // that the writer wakes for before their time
    private const int Gather = 10; // ms: their time
    private const int Look = 1000; // ms between two looks at whether it gets on
    private const int Patience = 6; // looks: five seconds at least

    private readonly Queue<Piece> _pieces = []; // under the gate, as all below
    private readonly Queue<(int Length, TaskCompletionSource<bool> Turn)> _waiting = [];
    private Piece? _last; // of the pieces
    private int _end; // of it in the ring
    private int _used; // bytes of the ring
    private int _promised; // bytes for those whose turn has come
    private int _looks; // in a row that have seen one and the same write
    private bool _isWriting;
    private bool _isClosing;
    private bool _isFailing; // which has been said, until something is written

    private byte[] _ring = [];
    private Timer? _timer; // owned; disposed by Close
    private Thread? _writer;

    /// <summary>Held while what Add has returned is filled.</summary>
    internal object Gate => _pieces;

    internal void Open()
    {
        _ring = GC.AllocateUninitializedArray<byte>(Size);
        _timer = new Timer(_ => LookAtWriter(), null, Look, Look);
        _writer = new Thread(Run, 128 << 10) { IsBackground = true, Name = name };
        _writer.Start();
    }

    /// <summary>Waits for what is still to be written, as long as the writer gets on.</summary>
    internal void Close()
    {
        lock (Gate)
        {
            _isClosing = true;
            Monitor.Pulse(Gate);
        }

        while (_writer?.Join(Look) == false && Volatile.Read(ref _looks) < Patience)
        {
            // it gets on
        }

        _timer?.Dispose(); // which would hold the ring
    }

    /// <summary>Waits for room, in turn; it is to be used at once. False where there will be none.</summary>
    internal async ValueTask<bool> RoomAsync(int length)
    {
        TaskCompletionSource<bool> turn = null!;
        lock (Gate)
        {
            bool isFree = _waiting.Count == 0 && _used + _promised + length <= Most;
            _promised += isFree ? length : 0;
            if (isFree || _isClosing || _looks >= Patience)
            {
                return isFree;
            }

            _waiting.Enqueue((length, turn = new TaskCompletionSource<bool>()));
        }

        Bell? home = Bell.OfLoop();
        bool isGiven = await turn.Task; // which goes on in the writer's thread
        await EventLoop.TurnAsync(home);
        return isGiven;
    }

    /// <summary>A place for the next bytes of a file; an empty one where it is over, or if there is none, but to whom it is
    /// promised.</summary>
    internal Span<byte> Add(SpoolFile file, int length, bool isPromised = false, bool isLast = false)
    {
        _promised -= isPromised ? length : 0;
        if (file.IsOver && !isLast)
        {
            LetIn(); // nobody else may do that any more
            return default;
        }

        bool isOver = Size - _end < length; // the end of the ring
        int skipped = isOver ? Size - _end : 0;
        if (_used + skipped + length > Size)
        {
            return default;
        }

        _end = isOver ? 0 : _end;
        if (_pieces.Count == 0 || _last!.File != file || isOver)
        {
            _pieces.Enqueue(_last = new Piece { File = file, Start = _end, Skipped = skipped });
        }

        bool isFirst = _used == 0;
        bool hadEnough = _used >= Enough;
        _last.Length += length;
        _last.IsLast = isLast;
        _end += length;
        _used += skipped + length;
        if (isFirst || isLast || (!hadEnough && _used >= Enough))
        {
            Monitor.Pulse(Gate);
        }

        return _ring.AsSpan(_end - length, length);
    }

    /// <summary>No more is added to it.</summary>
    internal void End(SpoolFile file)
    {
        lock (Gate)
        {
            Add(file, 0, isLast: true);
            file.IsOver = true;
        }
    }

    /// <summary>What is added to it from now on is lost. Said once for all files, until one can be written to again.</summary>
    internal void GiveUp(SpoolFile file, string? reason)
    {
        file.IsOver = true;
        if (!Interlocked.Exchange(ref _isFailing, true))
        {
            file.Say(reason);
        }
    }

    private void LookAtWriter()
    {
        lock (Gate)
        {
            _looks = _isWriting ? _looks + 1 : 0;
            while (_looks >= Patience && _waiting.TryDequeue(out (int, TaskCompletionSource<bool> Turn) one))
            {
                one.Turn.SetResult(false);
            }
        }
    }

    // ---- the writer

    private void Run()
    {
        while (Take(out int length) is { } piece)
        {
            SpoolFile file = piece.File;
            if (length > 0 && !file.HasFailed && file.Write(_ring.AsSpan(piece.Start, length)) is { } failure)
            {
                GiveUp(file, failure);
            }

            if (Free(piece, length))
            {
                file.Close();
            }
        }
    }

    /// <summary>The first piece, when there is a slice of it or it has waited for its time. Null at the end.</summary>
    private Piece? Take(out int length)
    {
        lock (Gate)
        {
            while (true)
            {
                length = 0;
                long wait = Timeout.Infinite;
                if (_pieces.TryPeek(out Piece? piece))
                {
                    length = Math.Min(piece.Length, piece.File.LeftOfSlice);
                    wait = piece.Time + Gather - Environment.TickCount64;
                    _isWriting = _isClosing || wait <= 0 || _used >= Enough || length == piece.File.LeftOfSlice;
                }

                if (_isWriting || _isClosing)
                {
                    return piece;
                }

                Monitor.Wait(Gate, (int)wait);
            }
        }
    }

    /// <summary>True when those were the last bytes of their file.</summary>
    private bool Free(Piece piece, int length)
    {
        lock (Gate)
        {
            (_isWriting, _looks, _isFailing) = (false, 0, _isFailing && (length == 0 || piece.File.HasFailed));
            _used -= piece.Skipped + length;
            (piece.Start, piece.Length, piece.Skipped) = (piece.Start + length, piece.Length - length, 0);
            piece.Time = Environment.TickCount64;
            if (piece.Length == 0)
            {
                _pieces.Dequeue();
            }

            _end = _used == 0 ? 0 : _end; // what is not used often stays in the processor's cache
            LetIn();
            return piece.Length == 0 && piece.IsLast;
        }
    }

    private void LetIn()
    {
        while (_waiting.TryPeek(out (int Length, TaskCompletionSource<bool> Turn) next)
            && _used + _promised + next.Length <= Most)
        {
            _waiting.Dequeue();
            _promised += next.Length;
            next.Turn.SetResult(true);
        }
    }

    /// <summary>Bytes of one file that stand in one place.</summary>
    private sealed class Piece
    {
        internal SpoolFile File { get; init; } = null!;
        internal int Start { get; set; }
        internal int Length { get; set; }
        internal int Skipped { get; set; } // before it, at the end of the ring
        internal bool IsLast { get; set; } // of its file
        internal long Time { get; set; } = Environment.TickCount64;
    }
}

// ---- record: what each side sends, in a file of its own, named as by the fourth variation of the original (v03)

internal sealed class RecordSettings(string folder) : TapSettings
{
    private readonly string _folder = folder;
    private readonly Spool _spool = new("record");
    private Log? _log;
    private int _number = 1; // of the last file whose name was taken; the writer's

    internal override void Open(Log log)
    {
        try
        {
            string probe = Path.Combine(_folder, $".tcpproxy-{Text.Of(Environment.ProcessId)}");
            new FileStream(probe, FileMode.CreateNew, FileAccess.Write, FileShare.None, 1, FileOptions.DeleteOnClose).Dispose();
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            throw new IOException($"--record: cannot write to {_folder}: {Text.Reason(e)}");
        }

        _log = log;
        _spool.Open();
    }

    internal override void Close() => _spool.Close();

    internal override bool Is(TapSettings other) => other is RecordSettings record && record._folder == _folder;

    internal override void AddTo(Conversation conversation)
    {
        Recording recording = new(this, conversation);
        conversation.LineOf(isUp: true).Add(new RecordTap(_spool, recording, isUp: true));
        conversation.LineOf(isUp: false).Add(new RecordTap(_spool, recording, isUp: false));
    }

    /// <summary>One whose ds file is not there. Numbers only grow: of many in a second, none searches long for its own.</summary>
    internal string FreeName(string name)
    {
        string free = name;
        while (File.Exists(PathOf("ds", free)))
        {
            free = $"{name}_{Text.Of(++_number)}";
        }

        return free;
    }

    internal string PathOf(string side, string name) => Path.Combine(_folder, $"{side}_{name}.log");

    internal void Say(Conversation about, string? reason) => _log!.Event(LogLevel.Warn, "record",
        $"{Text.Of(about.Client)} is not recorded any more: {reason ?? $"{_folder} does not answer"}", about.RouteTitle);
}

/// <summary>A connection, and from its first byte on its files: what came from downstream, and from upstream.</summary>
internal sealed class Recording
{
    private readonly RecordSettings _settings;
    private string _name;
    private bool _isNamed;

    internal Recording(RecordSettings settings, Conversation about)
    {
        _settings = settings;
        string address = Address.Of(about.Client)?.ToString().Replace(':', '-') ?? "unix"; // no path, which anybody may choose
        _name = $"{address}_{string.Concat(Text.Of(DateTime.UtcNow)[..19].Split('-', 'T', ':'))}";
        (Down, Up) = (new SpoolFile(() => Create("ds"), Say), new SpoolFile(() => Create("us"), Say));

        void Say(string? reason) => settings.Say(about, reason);
    }

    internal SpoolFile Down { get; }
    internal SpoolFile Up { get; }
    internal bool IsOver => Down.IsOver || Up.IsOver;

    /// <summary>Never over a file that is there. With the first of them comes the other, empty.</summary>
    private FileStream Create(string side)
    {
        if (!_isNamed)
        {
            (_name, _isNamed) = (_settings.FreeName(_name), true);
            (side == "ds" ? Up : Down).Open();
        }

        FileStreamOptions options = new() { Mode = FileMode.CreateNew, Access = FileAccess.Write, BufferSize = 0 };
        if (!OperatingSystem.IsWindows())
        {
            options.UnixCreateMode = UnixFileMode.UserRead | UnixFileMode.UserWrite;
        }

        return new FileStream(_settings.PathOf(side, _name), options);
    }
}

internal sealed class RecordTap(Spool spool, Recording recording, bool isUp) : Tap
{
    private const int Most = 64 << 10; // bytes of a piece

    internal override async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        SpoolFile file = isUp ? recording.Down : recording.Up;
        for (int i = 0, length; i < bytes.Length && !recording.IsOver; i += length)
        {
            length = Math.Min(Most, bytes.Length - i);
            if (!await spool.RoomAsync(length))
            {
                spool.GiveUp(file, null);
                break;
            }

            lock (spool.Gate)
            {
                bytes.Span.Slice(i, length).TryCopyTo(spool.Add(file, length, isPromised: true));
            }
        }

        await Next.WriteAsync(bytes);
    }

    internal override void End(CloseReason reason)
    {
        if (isUp)
        {
            spool.End(recording.Down);
            spool.End(recording.Up);
        }
    }
}

// ---- pcap
//
// A capture shows client and server as if they spoke to each other, in one TCP connection that never was. It begins when the
// server is connected; what a pump receives at once is a packet or a few; the other side acknowledges it when those behind the
// tap have taken it; FIN and RST come from whoever sent them to the proxy, and RST from both sides where the proxy sent it.

internal sealed class CaptureSettings
{
    internal long Rotate { get; set; } // bytes in a file before there is another; 0 = off

    /// <exception cref="FormatException">it is no file name</exception>
    internal void AddTo(List<TapSettings> taps, string file)
    {
        Capture capture = new(file == Capture.Stdout ? file : Path.GetFullPath(Text.FileName(file)), this);
        taps.AddRange(taps.Exists(capture.Is) ? [] : [capture]);
    }
}

/// <summary>One file, however many routes name it, and those that it rotates to; or stdout. Nothing is ever left out of the
/// middle.</summary>
internal sealed class Capture(string file, CaptureSettings settings) : TapSettings
{
    internal const string Stdout = "-";

    private const string TooSlow = "it is written too slowly";
    private const int MarkEvery = 1 << 20; // bytes

    private readonly Spool _spool = new("pcap");
    private readonly StrongBox<bool> _hasFailed = new(); // of all its files: none goes on where one has stopped
    private List<long> _marks = []; // in the file: where a block begins; under the gate, as the next five
    private SpoolFile _file = null!; // from Open on
    private long _size; // of it
    private int _files;
    private long _time; // of the last packet, in nanoseconds since 1970
    private int _standIns;
    private Log? _log;

    internal string File { get; } = file;
    internal bool IsOver => _file.IsOver;

    internal override void Open(Log log)
    {
        _log = log;
        _file = NewFile(File);
        try
        {
            _file.Open();
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            throw new IOException($"--pcap: cannot open {File}: {Text.Reason(e)}");
        }

        _spool.Open();
        lock (_spool.Gate)
        {
            Begin();
        }
    }

    internal override void Close()
    {
        if (_file is not null) // else it was never opened
        {
            _spool.End(_file);
        }

        _spool.Close();
    }

    internal override bool Is(TapSettings other) => other is Capture capture && capture.File == File;

    internal override void AddTo(Conversation conversation)
    {
        if (!IsOver)
        {
            CaptureTap.AddTo(conversation, this, Interlocked.Increment(ref _standIns));
        }
    }

    /// <summary>Waits for room for packets of so many bytes together. False where there will be none: it is over.</summary>
    internal async ValueTask<bool> RoomAsync(int length)
    {
        bool isPromised = await _spool.RoomAsync(length);
        if (!isPromised)
        {
            _spool.GiveUp(_file, File == Stdout ? "its reader has stopped reading" : "its disk has stopped");
        }

        return isPromised;
    }

    /// <summary>A packet from one side of a connection. An acknowledgement of nothing new is left out.</summary>
    internal void Add(CaptureTap from, int flags, ReadOnlySpan<byte> bytes = default, bool isPromised = false)
    {
        lock (_spool.Gate)
        {
            if (flags == CaptureTap.Ack && bytes.Length == 0 && !from.HasNews)
            {
                return;
            }

            int length = from.BlockLength(bytes.Length);
            bool isFull = settings.Rotate > 0 && _size + length > settings.Rotate && _size > CaptureTap.FileHead().Length;
            if (isFull && !IsOver && File != Stdout)
            {
                _spool.End(_file);
                _file = NewFile($"{File}{Text.Of(++_files)}");
                Begin();
            }

            Span<byte> block = _spool.Add(_file, length, isPromised);
            if (block.IsEmpty)
            {
                if (!IsOver)
                {
                    _spool.GiveUp(_file, TooSlow);
                }

                return;
            }

            _time = Math.Max(_time, (DateTime.UtcNow - DateTime.UnixEpoch).Ticks * TimeSpan.NanosecondsPerTick);
            from.Write(block, _time, flags, bytes);
            if (_size >= (_marks.Count + 1L) * MarkEvery)
            {
                _marks.Add(_size);
            }

            _size += length;
        }
    }

    private SpoolFile NewFile(string path)
    {
        List<long> marks = _marks = [];
        return new SpoolFile(
            File == Stdout ? null : () => new(path, FileMode.Create, FileAccess.ReadWrite, FileShare.Read | FileShare.Delete, 0),
            reason => _log!.Event(LogLevel.Warn, "pcap", $"the capture {File} has ended: {reason}"), _hasFailed)
        {
            Whole = stream => WholeBlocks(stream, marks),
        };
    }

    private void Begin()
    {
        ReadOnlySpan<byte> head = CaptureTap.FileHead();
        _size = head.Length;
        if (!head.TryCopyTo(_spool.Add(_file, head.Length)))
        {
            _spool.GiveUp(_file, TooSlow);
        }
    }

    /// <summary>On a full disk, what is there stays legible.</summary>
    private long WholeBlocks(FileStream stream, List<long> marks)
    {
        const int Least = 12; // bytes of a block
        long whole = 0;
        lock (_spool.Gate)
        {
            whole = marks.FindLast(mark => mark <= stream.Length);
        }

        Span<byte> head = stackalloc byte[8];
        while (RandomAccess.Read(stream.SafeFileHandle, head, whole) == head.Length
            && BinaryPrimitives.ReadInt32LittleEndian(head[4..]) is >= Least and int length && whole + length <= stream.Length)
        {
            whole += length;
        }

        return whole;
    }
}

/// <summary>One side of a captured connection, and the packets that it sends: IPv4 (RFC 791) if both sides have it, else IPv6
/// (RFC 8200) with IPv4 mapped into it, then TCP (RFC 9293).</summary>
internal sealed class CaptureTap : Tap
{
    internal const int Fin = 1;
    internal const int Syn = 2;
    internal const int Reset = 4;
    internal const int Push = 8;
    internal const int Ack = 16;

    private const byte Tcp = 6; // protocol number
    private const int TcpHead = 20; // bytes
    private const int BlockHead = 28; // of pcapng's enhanced packet block
    private const int WindowScale = 14; // the largest (RFC 7323, 2.3): a window of 1 GB, which never fills

    private readonly Capture _capture;
    private readonly bool _isUp;
    private readonly byte[] _head; // of IP and TCP, without what differs from packet to packet
    private readonly int _ip; // bytes of it
    private readonly ulong _sum; // of the pseudo-header, but for the length
    private CaptureTap _peer = null!;

    // under the capture's gate
    private uint _sequence; // number of the next byte
    private uint _acknowledged; // by the peer
    private bool _hasFinished;

    internal CaptureTap(Capture capture, Conversation conversation, bool isUp, byte[] head)
    {
        (_capture, _isUp, _head, _ip) = (capture, isUp, head, head.Length - TcpHead);
        _sum = InternetChecksum.Sum(head.AsSpan(_ip == 20 ? 12.._ip : 8.._ip)) + InternetChecksum.Number(Tcp);
        _sequence = (uint)(Environment.TickCount64 * 250) + (isUp ? 0 : 1u << 31); // a clock of 4 us: RFC 9293, 3.4.1
        conversation.LineOf(isUp).Add(this);
    }

    /// <summary>What the peer has sent is not acknowledged yet.</summary>
    internal bool HasNews => _peer._acknowledged != _peer._sequence;

    private int MostPayload => ushort.MaxValue - _head.Length;

    /// <summary>Both sides; the client connects. Who has no IP address gets one of TEST-NET-1 (RFC 5737).</summary>
    internal static void AddTo(Conversation conversation, Capture capture, int standIn)
    {
        const int UnixPort = 1;
        const int EchoPort = 7; // RFC 862
        const int DiscardPort = 9; // RFC 863
        IPEndPoint client = conversation.Client as IPEndPoint ?? new(new IPAddress([192, 0, 2, 1]), 1024 + (standIn & 0x7fff));
        IPEndPoint server = conversation.Upstream as IPEndPoint ?? new(new IPAddress([192, 0, 2, 2]),
            conversation.Upstream is not null ? UnixPort : conversation.IsEcho ? EchoPort : DiscardPort);
        bool isV4 = IsV4(client.Address) && IsV4(server.Address);
        CaptureTap up = new(capture, conversation, isUp: true, Head(client, server, isV4));
        CaptureTap down = new(capture, conversation, isUp: false, Head(server, client, isV4));
        (up._peer, down._peer) = (down, up);
        byte[] options = [2, 4, (byte)(up.MostPayload >> 8), (byte)up.MostPayload, 1, 3, 3, WindowScale]; // the first is MSS
        capture.Add(up, Syn, options);
        capture.Add(down, Syn | Ack, options);
        capture.Add(up, Ack);

        static bool IsV4(IPAddress address) => address.AddressFamily == AddressFamily.InterNetwork || address.IsIPv4MappedToIPv6;
    }

    internal override async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        for (int i = 0, next; i < bytes.Length && !_capture.IsOver; i = next)
        {
            next = Math.Min(i + MostPayload, bytes.Length);
            bool isPromised = await _capture.RoomAsync(BlockLength(next - i));
            _capture.Add(this, next < bytes.Length ? Ack : Push | Ack, bytes.Span[i..next], isPromised);
        }

        await Next.WriteAsync(bytes);
        _capture.Add(_peer, Ack);
    }

    internal override async ValueTask FinishAsync()
    {
        _capture.Add(this, Fin | Ack);
        await Next.FinishAsync();
        _capture.Add(_peer, Ack);
    }

    internal override void End(CloseReason reason)
    {
        foreach (CaptureTap side in _isUp ? (CaptureTap[])[this, _peer] : []) // one speaks for both
        {
            if (reason.IsOrderly && !side._hasFinished)
            {
                _capture.Add(side, Fin | Ack);
                _capture.Add(side._peer, Ack);
            }
            else if (!reason.IsOrderly && !reason.Code.StartsWith(side._isUp ? 'S' : 'C'))
            {
                _capture.Add(side, Reset | Ack);
            }
        }
    }

    // ---- packets

    /// <summary>What a file begins with: a section header, and the one interface, which is of LINKTYPE_RAW (101). All of it in
    /// the machine's order of bytes (draft-ietf-opsawg-pcapng).</summary>
    internal static ReadOnlySpan<byte> FileHead() => MemoryMarshal.AsBytes((ReadOnlySpan<uint>)
    [
        0x0A0D0D0A, 44, 0x1A2B3C4D, 1, ~0u, ~0u, 4 | (8 << 16), 0x70706374, 0x79786f72, 0, 44, // shb_userappl: tcpproxy
        1, 44, 101, 0, 2 | (8 << 16), 0x70706374, 0x79786f72, 9 | (1 << 16), 9, 0, 44, // if_name: tcpproxy; if_tsresol: 10^-9 s
    ]);

    internal int BlockLength(int payload) => BlockHead + ((_head.Length + payload + 3) & ~3) + 4;

    /// <summary>Fills <paramref name="block"/>. The options of a SYN stand where other packets have bytes.</summary>
    internal void Write(Span<byte> block, long time, int flags, ReadOnlySpan<byte> bytes)
    {
        bool isSyn = (flags & Syn) != 0;
        int length = _head.Length + bytes.Length;
        Span<uint> words = MemoryMarshal.Cast<byte, uint>(block);
        (words[0], words[1], words[2], words[3], words[4]) = (6, (uint)block.Length, 0, (uint)(time >> 32), (uint)time);
        (words[5], words[6], words[^2], words[^1]) = ((uint)length, (uint)length, 0, (uint)block.Length);
        Span<byte> packet = block.Slice(BlockHead, length);
        _head.CopyTo(packet);
        ulong sum = _sum + InternetChecksum.Copy(bytes, packet[_head.Length..]);
        Span<byte> segment = packet[_ip..];
        BinaryPrimitives.WriteUInt32BigEndian(segment[4..], _sequence);
        BinaryPrimitives.WriteUInt32BigEndian(segment[8..], (flags & Ack) != 0 ? _peer._sequence : 0);
        (segment[12], segment[13]) = ((byte)((isSyn ? TcpHead + bytes.Length : TcpHead) << 2), (byte)flags);
        sum += InternetChecksum.Number(segment.Length);
        MemoryMarshal.Write(segment[16..], InternetChecksum.Of(segment[..TcpHead], sum));
        if (packet[0] == 0x45)
        {
            BinaryPrimitives.WriteUInt16BigEndian(packet[2..], (ushort)length);
            MemoryMarshal.Write(packet[10..], InternetChecksum.Of(packet[.._ip]));
        }
        else
        {
            BinaryPrimitives.WriteUInt16BigEndian(packet[4..], (ushort)(length - _ip));
        }

        _sequence += (isSyn ? 0 : (uint)bytes.Length) + ((flags & (Syn | Fin)) != 0 ? 1u : 0);
        _peer._acknowledged = (flags & Ack) != 0 ? _peer._sequence : _peer._acknowledged;
        _hasFinished |= (flags & Fin) != 0;
    }

    private static byte[] Head(IPEndPoint from, IPEndPoint to, bool isV4)
    {
        const byte Hops = 64;
        byte[] addresses = [.. Bytes(from.Address), .. Bytes(to.Address)];
        byte[] tcp = [(byte)(from.Port >> 8), (byte)from.Port, (byte)(to.Port >> 8), (byte)to.Port, .. new byte[TcpHead - 4]];
        (tcp[14], tcp[15]) = (byte.MaxValue, byte.MaxValue); // the window
        return isV4 ? [0x45, 0, 0, 0, 0, 0, 0x40, 0, Hops, Tcp, 0, 0, .. addresses, .. tcp] // do not fragment
            : [0x60, 0, 0, 0, 0, 0, Tcp, Hops, .. addresses, .. tcp];

        byte[] Bytes(IPAddress address) => (isV4 ? address.MapToIPv4() : address.MapToIPv6()).GetAddressBytes();
    }
}

/// <summary>Of IP and TCP (RFC 1071), computed in the machine's order of bytes, whichever that is (2B).</summary>
internal static class InternetChecksum
{
    internal static ushort Of(ReadOnlySpan<byte> bytes, ulong sum = 0)
    {
        sum += Sum(bytes);
        while (sum > ushort.MaxValue)
        {
            sum = (sum & ushort.MaxValue) + (sum >> 16);
        }

        return (ushort)~sum;
    }

    /// <summary>Of words of 32 bits, which fold into words of 16.</summary>
    internal static ulong Sum(ReadOnlySpan<byte> bytes)
    {
        ulong sum = 0;
        foreach (uint word in MemoryMarshal.Cast<byte, uint>(bytes))
        {
            sum += word;
        }

        uint last = 0;
        bytes[(bytes.Length & ~3)..].CopyTo(MemoryMarshal.AsBytes(new Span<uint>(ref last)));
        return sum + last;
    }

    /// <summary>The same, copied on the way: at most 1 MB, whose halves of words no word of 32 bits can overflow with.</summary>
    internal static ulong Copy(ReadOnlySpan<byte> from, Span<byte> to)
    {
        ReadOnlySpan<Vector<uint>> source = MemoryMarshal.Cast<byte, Vector<uint>>(from);
        Span<Vector<uint>> target = MemoryMarshal.Cast<byte, Vector<uint>>(to)[..source.Length];
        (Vector<uint> low, Vector<uint> high) = (Vector<uint>.Zero, Vector<uint>.Zero);
        for (int i = 0; i < source.Length; i++)
        {
            Vector<uint> words = source[i];
            target[i] = words;
            low += words & new Vector<uint>(ushort.MaxValue);
            high += words >>> 16;
        }

        Vector.Widen(low, out Vector<ulong> one, out Vector<ulong> two);
        Vector.Widen(high, out Vector<ulong> three, out Vector<ulong> four);
        int done = source.Length * Vector<byte>.Count;
        from[done..].CopyTo(to[done..]);
        return Vector.Sum(one + two + three + four) + Sum(from[done..]);
    }

    /// <summary>A number of 16 bits as it stands in a packet.</summary>
    internal static ulong Number(int number) => (ushort)IPAddress.HostToNetworkOrder((short)number);
}

// ---- replace and block

/// <summary>Bytes to look for and what to put in their place, or null where they end the connection.</summary>
internal sealed class MatchRule(string text, string pattern, string? replacement)
{
    internal string Words { get; } = text; // as it was typed
    internal byte[] Pattern { get; } = pattern.Length > 0 ? Text.Unescape(pattern)
        : throw new FormatException($"'{text}': nothing to look for");
    internal byte[]? Replacement { get; } = replacement is null ? null : Text.Unescape(replacement);

    /// <exception cref="FormatException">it is not OLD=>NEW</exception>
    internal static MatchRule ParseReplace(string text) =>
        text.IndexOf("=>", StringComparison.Ordinal) is int arrow and >= 0 ? new(text, text[..arrow], text[(arrow + 2)..])
        : throw new FormatException($"'{text}' has no =>; write OLD=>NEW");
}

/// <summary>The rules of one kind that follow each other in a direction: they are one tap, and cost one pass.</summary>
internal sealed class MatchSettings(bool isUp, MatchRule[] rules) : TapSettings
{
    private const int Largest = 16 << 10; // bytes of all patterns of a tap, which makes 32 MB of nodes

    private readonly bool _isUp = isUp;
    private Matcher? _matcher;

    internal MatchRule[] Rules { get; } = rules;

    /// <summary>Into a list whose settings other routes may share: they stay as they are.</summary>
    internal static void Add(List<TapSettings> taps, bool isUp, MatchRule rule)
    {
        MatchRule[] rules = [rule];
        if (taps.FindLast(tap => tap is not MatchSettings other || other._isUp == isUp) is MatchSettings last
            && last.Rules[0].Replacement is null == rule.Replacement is null)
        {
            rules = [.. last.Rules, rule];
            taps.Remove(last);
        }

        int size = 0;
        Array.ForEach(rules, one => size += one.Pattern.Length);
        taps.Add(size <= Largest ? new MatchSettings(isUp, rules)
            : throw new FormatException($"the patterns together have {size} bytes; they may have {Largest}"));
    }

    internal override void Open(Log log) => _matcher = new Matcher(Array.ConvertAll(Rules, rule => rule.Pattern));

    internal override void AddTo(Conversation conversation) => conversation.LineOf(_isUp).Add(new MatchTap(_matcher!, Rules));
}

/// <summary>A state of a Matcher: bytes that have come and may yet become a match. They are the beginning of a pattern, so
/// whoever waits here needs no copy of them. 2 KB, and there are as many as the patterns have bytes.</summary>
internal sealed class MatchNode(byte[] pattern, int depth)
{
    internal MatchNode?[] Moves { get; } = new MatchNode?[256]; // by the next byte; null: what has been found is the match
    internal ReadOnlyMemory<byte> Held => pattern.AsMemory(0, depth);
    internal bool IsEnd { get; set; } = true; // nothing that comes can make the match another
    internal int Found { get; set; } = -1; // the pattern that lies in these bytes
    internal int FoundAt { get; private set; }
    internal MatchNode? Fail { get; private set; } // the longest end of these bytes that is a node too; null as above

    internal void FailTo(MatchNode? fail, MatchNode parent)
    {
        int skipped = depth - fail?.Held.Length ?? 0;
        if (Found < 0)
        {
            (Found, FoundAt) = fail is { Found: >= 0 } && (parent.Found < 0 || skipped + fail.FoundAt <= parent.FoundAt)
                ? (fail.Found, skipped + fail.FoundAt) : (parent.Found, parent.FoundAt);
        }

        Fail = Found < 0 || FoundAt >= skipped ? fail : null;
    }
}

/// <summary>Finds the leftmost match of many patterns, and of those in one place the first one's, in one pass over what comes
/// in pieces: the automaton of Aho and Corasick (1975), all its moves worked out. Only what follows a match that had to wait
/// for a longer one is looked at twice.</summary>
internal sealed class Matcher
{
    private readonly byte[][] _patterns;
    private readonly SearchValues<byte> _firsts;

    internal Matcher(byte[][] patterns)
    {
        _patterns = patterns;
        _firsts = SearchValues.Create(Array.ConvertAll(patterns, pattern => pattern[0]));
        List<MatchNode> nodes = [Root];
        for (int p = 0; p < patterns.Length; p++)
        {
            MatchNode node = Root;
            for (int i = 0; i < patterns[p].Length && node.Found < 0; i++)
            {
                node.IsEnd = false;
                node = node.Moves[patterns[p][i]] ??= new MatchNode(patterns[p], i + 1);
            }

            node.Found = node.Found < 0 ? p : node.Found; // one that begins with one written before it is never the match
        }

        for (int i = 0; i < 256 * nodes.Count; i++) // from the root outward
        {
            MatchNode node = nodes[i >> 8];
            ref MatchNode? move = ref node.Moves[i & 255];
            MatchNode? other = node == Root ? Root : node.Fail?.Moves[i & 255];
            if (move is not null)
            {
                move.FailTo(other, node);
                nodes.Add(move);
            }

            move ??= other;
        }
    }

    internal MatchNode Root { get; } = new([], 0);

    /// <summary>The next match in <paramref name="bytes"/>, of which those before <paramref name="at"/> have led to
    /// <paramref name="node"/>; at is its end then. When there is none, what the node holds may be the beginning of one,
    /// unless these bytes are the last.</summary>
    internal bool Find(ReadOnlySpan<byte> bytes, bool isLast, ref int at, ref MatchNode node, out int start, out int pattern)
    {
        (MatchNode state, int i) = (node, at); // not by reference, a store through which costs the collector's barrier
        MatchNode? next = state;
        while (i < bytes.Length && next is not null)
        {
            if (state == Root && bytes[i..].IndexOfAny(_firsts) is int skip and not 0)
            {
                i = skip < 0 ? bytes.Length : i + skip;
                continue;
            }

            next = state.Moves[bytes[i]];
            (state, i) = next is null ? (state, i) : (next, i + 1);
        }

        pattern = next is null || isLast || state.IsEnd ? state.Found : -1;
        start = i - state.Held.Length + state.FoundAt;
        (at, node) = pattern < 0 ? (i, state) : (start + _patterns[pattern].Length, Root);
        return pattern >= 0;
    }
}

/// <summary>Replaces what its rules find, or ends the connection. What may become a match at the end of a read is held for
/// as long as <paramref name="patience"/> (ms); then it goes on, and is no part of a replacement any more.</summary>
#pragma warning disable CA1001 // a semaphore without a wait handle holds nothing to dispose of
internal sealed class MatchTap(Matcher matcher, MatchRule[] rules, int patience = 100) : Tap
#pragma warning restore CA1001
{
    private const int OutputSize = 64 << 10;

    private readonly SemaphoreSlim _turn = new(1); // of the pump, or of the timer
    private Timer? _timer; // owned; disposed by End
    private MatchNode _node = matcher.Root; // where the bytes that are held wait
    private int _passed; // of them: blocking looks on for the rest of a match whose beginning has waited too long
    private long _offset; // of the first of them in the direction
    private long _due; // ms: when they go on
    private byte[] _output = []; // rented while there is something in it
    private int _filled;

    internal override ValueTask WriteAsync(ReadOnlyMemory<byte> bytes) => EditAsync(bytes, isLast: false);

    internal override async ValueTask FinishAsync()
    {
        await EditAsync(default, isLast: true);
        await Next.FinishAsync();
    }

    internal override void End(CloseReason reason) => _timer?.Dispose();

    private static void PassHeld(object? tap) => _ = ((MatchTap)tap!).EditAsync(default, isLast: true, isTimer: true).AsTask();

    private async ValueTask EditAsync(ReadOnlyMemory<byte> bytes, bool isLast, bool isTimer = false)
    {
        byte[] joined = [];
        await _turn.WaitAsync();
        try
        {
            ReadOnlyMemory<byte> held = _node.Held;
            if (isTimer && held.Length <= _passed)
            {
                return; // it was decided meanwhile
            }

            if (isTimer && _due - Environment.TickCount64 is long left and > 0)
            {
                _timer!.Change(left, Timeout.Infinite); // more has come meanwhile
                return;
            }

            if (isTimer && rules[0].Replacement is null && _node.Found < 0)
            {
                await Next.WriteAsync(held[_passed..]);
                _passed = held.Length;
                return;
            }

            if (held.Length > 0)
            {
                joined = ArrayPool<byte>.Shared.Rent(held.Length + bytes.Length);
                held.CopyTo(joined);
                bytes.CopyTo(joined.AsMemory(held.Length));
                bytes = joined.AsMemory(0, held.Length + bytes.Length);
            }

            await ReplaceAsync(bytes, held.Length, isLast);
            if (_node != matcher.Root)
            {
                _due = Environment.TickCount64 + patience;
                _timer ??= new Timer(PassHeld, this, Timeout.Infinite, Timeout.Infinite);
                _timer.Change(patience, Timeout.Infinite);
            }
        }
        catch (Exception e) when (isTimer)
        {
            Line.Fail(e);
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(joined);
            ArrayPool<byte>.Shared.Return(_output);
            (_output, _filled) = ([], 0);
            _turn.Release();
        }
    }

    private async ValueTask ReplaceAsync(ReadOnlyMemory<byte> bytes, int at, bool isLast)
    {
        int done = _passed;
        while (matcher.Find(bytes.Span, isLast, ref at, ref _node, out int start, out int pattern))
        {
            byte[]? replacement = rules[pattern].Replacement;
            await AddAsync(bytes[done..Math.Max(done, start)], isFlush: replacement is null);
            await AddAsync(replacement
                ?? throw new TapException($"blocked by '{rules[pattern].Words}' at byte {_offset + start}"));
            done = at;
        }

        _node = isLast ? matcher.Root : _node;
        int end = bytes.Length - _node.Held.Length;
        ReadOnlyMemory<byte> rest = bytes[done..Math.Max(done, end)];
        _passed = done + rest.Length - end;
        _offset += end;
        await (_filled > 0 ? AddAsync(rest, isFlush: true) : rest.Length > 0 ? Next.WriteAsync(rest) : default);
    }

    private async ValueTask AddAsync(ReadOnlyMemory<byte> bytes, bool isFlush = false)
    {
        _output = _output.Length > 0 ? _output : ArrayPool<byte>.Shared.Rent(OutputSize);
        while (bytes.Length > 0 || (isFlush && _filled > 0))
        {
            int length = Math.Min(bytes.Length, OutputSize - _filled);
            bytes[..length].CopyTo(_output.AsMemory(_filled));
            bytes = bytes[length..];
            _filled += length;
            if (_filled == OutputSize || (isFlush && bytes.Length == 0))
            {
                await Next.WriteAsync(_output.AsMemory(0, _filled));
                _filled = 0;
            }
        }
    }
}

// ---- toxics
//
// Faults on purpose, under toxiproxy's names, in its units and with its meaning (Shopify/toxiproxy, README, "Toxics"). Two
// words of that README are taken literally where its code differs: timeout counts from the start of the connection, and not
// anew from each message; limit_data ends in order however much is on its way.

internal sealed class ToxicSettings : TapSettings
{
    private const int Certain = 1_000_000; // a toxicity of 1

    private static readonly string[][] Keys = // of each type
    [
        ["latency", "latency", "jitter"], ["bandwidth", "rate"], ["slow_close", "delay"], ["timeout", "timeout"],
        ["reset_peer", "timeout"], ["slicer", "average_size", "size_variation", "delay"], ["limit_data", "bytes"],
    ];

    private readonly string _type;
    private readonly long[] _values; // of its keys, stream and toxicity: microseconds, bytes, bytes a second

    private ToxicSettings(string type, long[] values) => (_type, _values) = (type, values);

    /// <summary>TYPE [KEY=VALUE...]</summary>
    /// <exception cref="FormatException">it is none</exception>
    internal static ToxicSettings Parse(string text)
    {
        string[] words = text.Replace('\t', ' ').Split(' ', StringSplitOptions.RemoveEmptyEntries);
        string type = words.Length > 0 ? words[0] : "";
        int number = Text.ParseWord(type, "toxic", Array.ConvertAll(Keys, words => words[0]));
        string[] keys = [.. Keys[number].AsSpan(1), "stream", "toxicity"];
        long[] values = new long[keys.Length];
        values[^1] = Certain;
        foreach (string word in words.AsSpan(1))
        {
            int equals = word.IndexOf('=', StringComparison.Ordinal);
            string key = equals < 0 ? word : word[..equals];
            int index = Text.ParseWord(key, $"setting of {type}", keys);
            Text.At(key, () => values[index] = equals < 0 ? throw new FormatException($"needs a value, as in {key}=1")
                : Parse(type, key, word[(equals + 1)..]));
        }

        return type != "slicer" || values[1] < values[0] ? new ToxicSettings(type, values) // else a slice could be empty
            : throw new FormatException("slicer: needs an average_size greater than size_variation, as in average_size=100");
    }

    private static long Parse(string type, string key, string value) => key switch
    {
        "stream" => Text.ParseWord(value, "stream", "downstream", "upstream"),
        "toxicity" => ParseShare(value),
        "bytes" => Units.ParseSize(value),
        "average_size" or "size_variation" => Units.ParseSize(value, most: 1 << 30),
        "rate" => Text.IsDigits(value) ? Units.ParseCount(value) * 1000L : Units.ParseRate(value),
        _ when !Text.IsDigits(value) => (long)Units.ParseTime(value).TotalMicroseconds,
        _ => Units.ParseCount(value) * (type == "slicer" ? 1L : 1000L),
    };

    /// <summary>0 to 1 in millionths. By hand: the runtime's own way to read a fraction is large.</summary>
    private static long ParseShare(string text)
    {
        int point = text.IndexOf('.', StringComparison.Ordinal);
        string whole = point < 0 ? text : text[..point];
        string rest = point < 0 ? "" : text[(point + 1)..];
        return Text.IsDigits(whole + rest) && rest.Length <= 6 && whole.Length <= 1
            && Units.ParseCount(whole + rest.PadRight(6, '0'), most: 9_999_999) is int share and <= Certain ? share
            : throw new FormatException($"'{text}' is not between 0 and 1; write 0.25");
    }

    internal override void AddTo(Conversation conversation)
    {
        Chance chance = conversation.NextChance();
        if (chance.Below(Certain) < _values[^1])
        {
            long first = _values[0];
            conversation.LineOf(isUp: _values[^2] == 1).Add(_type switch
            {
                "latency" => new Latency(Ticks(first), Ticks(_values[1]), chance),
                "bandwidth" => new Bandwidth(first),
                "slow_close" => new SlowClose(Ticks(first)),
                "timeout" or "reset_peer" => new DeadEnd(Ticks(first), _type == "reset_peer"),
                "slicer" => new Slicer(first, _values[1], Ticks(_values[2]), chance),
                _ => new LimitData(first),
            });
        }
    }

    private static long Ticks(long microseconds) => microseconds * (Stopwatch.Frequency / 1_000_000);
}

/// <summary>The chance of one toxic in one connection, which is always the same for the same seed and places: SplitMix64
/// (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).</summary>
internal sealed class Chance(long seed, long number, int place)
{
    private ulong _state = Mix(Mix(Mix((ulong)seed) + (ulong)number) + (ulong)place);

    internal long Below(long bound) => (long)Math.BigMul(Mix(_state += 0x9E3779B97F4A7C15), (ulong)bound, out _);

    /// <summary>From -<paramref name="bound"/> to just below it.</summary>
    internal long Around(long bound) => Below(2 * bound) - bound;

    private static ulong Mix(ulong z)
    {
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
}

/// <summary>A piece passes that long after it has come, and FIN behind the last. What is held is bounded: then the source
/// waits. Times are in ticks of <see cref="Stopwatch"/>, here and below.</summary>
internal sealed class Latency(long latency, long jitter, Chance chance) : Tap
{
    private const int Room = 4 << 20; // bytes: at 100 ms, 20 to 40 MB a second pass
    private const int Overhead = 256; // bytes of memory for a piece besides its own

    private Task _last = Task.CompletedTask; // of the deliveries, each of which waits for the one before
    private Task _middle = Task.CompletedTask; // the last of the first half of what is held
    private int _size; // of the second half
    private volatile bool _hasFailed;

    internal override async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        if (_hasFailed)
        {
            await Line.ForEverAsync(); // or the source would be read on and on for nobody
        }

        byte[] copy = ArrayPool<byte>.Shared.Rent(bytes.Length); // rule 2
        bytes.CopyTo(copy);
        long due = Stopwatch.GetTimestamp() + latency + chance.Around(jitter);
        _last = DeliverAsync(_last, copy, bytes.Length, due);
        _size += copy.Length + Overhead;
        if (_size >= Room / 2)
        {
            Task half = _middle;
            (_middle, _size) = (_last, 0);
            await half;
        }
    }

    internal override async ValueTask FinishAsync()
    {
        await _last;
        await (_hasFailed ? Line.ForEverAsync() : Next.FinishAsync());
    }

    private async Task DeliverAsync(Task before, byte[] copy, int length, long due)
    {
        await before;
        try
        {
            if (!_hasFailed)
            {
                await Line.UntilAsync(due);
                await Next.WriteAsync(copy.AsMemory(0, length));
            }
        }
#pragma warning disable CA1031 // the connection ends by it, or has ended
        catch (Exception e)
#pragma warning restore CA1031
        {
            _hasFailed = true;
            Line.Fail(e);
        }

        ArrayPool<byte>.Shared.Return(copy);
    }
}

/// <summary>A pace that holds on average: what a late wake-up has cost is made up for, a pause of the source is not.</summary>
internal sealed class Pace
{
    private static readonly long Millisecond = Stopwatch.Frequency / 1000;

    private long _next;
    private long _passedAt;

    /// <summary>Waits for as long as <paramref name="cost"/>, from where the last wait should have ended.</summary>
    internal async ValueTask WaitAsync(long cost, TapLine line)
    {
        long now = Stopwatch.GetTimestamp();
        _next = Math.Max(_next, now - _passedAt < 10 * Millisecond ? now - (50 * Millisecond) : now) + cost;
        await line.UntilAsync(_next - Millisecond + 1); // less than a millisecond no timer can wait
        _passedAt = Stopwatch.GetTimestamp();
    }
}

internal sealed class Bandwidth(long rate) : Tap
{
    private const int Slices = 50; // a second
    private const long Never = long.MaxValue / 4;

    private readonly Pace _pace = new();

    internal override async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        while (bytes.Length > 0)
        {
            int length = (int)Math.Min(bytes.Length, 1 + (rate / Slices));
            await _pace.WaitAsync(rate == 0 ? Never : length * Stopwatch.Frequency / rate, Line);
            await Next.WriteAsync(bytes[..length]);
            bytes = bytes[length..];
        }
    }
}

internal sealed class SlowClose(long delay) : Tap
{
    internal override ValueTask WriteAsync(ReadOnlyMemory<byte> bytes) => Next.WriteAsync(bytes);

    internal override async ValueTask FinishAsync()
    {
        await Line.DelayAsync(delay);
        await Next.FinishAsync();
    }
}

/// <summary>timeout and reset_peer: nothing passes. A timeout closes the connection <paramref name="wait"/> after its start
/// (zero: never), and at the source's FIN; a reset_peer resets it that long after the first bytes or the FIN.</summary>
internal sealed class DeadEnd(long wait, bool isReset) : Tap
{
    private Task? _end;

    internal override void Start() => EndIf(!isReset && wait > 0);

    internal override ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        EndIf(isReset);
        return default;
    }

    internal override ValueTask FinishAsync()
    {
        EndIf(isReset);
        return isReset ? Line.ForEverAsync() : Next.FinishAsync();
    }

    private void EndIf(bool isTime) => _end ??= !isTime ? null
        : Line.EndAfterAsync(wait, new TapException(isReset ? "toxic reset_peer" : "toxic timeout", isOrderly: !isReset));
}

/// <summary>Cuts in half, more or less by <paramref name="variation"/>, until a slice is no longer than average and
/// variation together.</summary>
internal sealed class Slicer(long average, long variation, long delay, Chance chance) : Tap
{
    private readonly Pace _pace = new();

    internal override async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        if (bytes.Length - average > variation)
        {
            int half = (bytes.Length / 2) + (int)chance.Around(variation);
            await WriteAsync(bytes[..half]);
            await WriteAsync(bytes[half..]);
        }
        else
        {
            await Next.WriteAsync(bytes);
            await _pace.WaitAsync(delay, Line);
        }
    }
}

/// <summary>So many bytes pass, then FIN. A moment later the connection is closed: whoever closes a socket with bytes in it
/// that were not received resets it, and destroys what is still on its way.</summary>
internal sealed class LimitData(long limit) : Tap
{
    private const int Linger = 1; // s

    private long _left = limit;
    private bool _isOver;

    internal override async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
    {
        int length = (int)Math.Min(bytes.Length, _left);
        _left -= length;
        await (length > 0 ? Next.WriteAsync(bytes[..length]) : default);
        if (_left == 0 && !_isOver)
        {
            _isOver = true;
            await Next.FinishAsync();
            Line.Finish();
            _ = Line.EndAfterAsync(Linger * Stopwatch.Frequency, new TapException("toxic limit_data", isOrderly: true));
        }
    }

    internal override ValueTask FinishAsync() => _isOver ? Line.ForEverAsync() : Next.FinishAsync();
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
        Child.Start(_path, _words, [$"TCPPROXY_CLIENT={Text.Of(about.Client)}", $"TCPPROXY_UPSTREAM={Text.Of(about.Upstream)}",
            $"TCPPROXY_ROUTE={about.RouteTitle}"], out int error)
        ?? throw new TapException($"filter not started: {Marshal.GetPInvokeErrorMessage(error)}");

    internal void Say(Conversation about, string text) =>
        _log!.Event(LogLevel.Warn, "filter", $"{Text.Of(about.Client)}: {text}", about.RouteTitle);
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
        SocketOptions.ShutDown(child.Pipe, SocketShutdown.Send);
        TimeSpan patience = about.FinTimeout > TimeSpan.Zero ? about.FinTimeout : Timeout.InfiniteTimeSpan;
        int seen;
        do
        {
            seen = _moves;
            await Task.WhenAny(_work, Task.Delay(patience, Line.Ending));
            Line.Ending.ThrowIfCancellationRequested();
        }
        while (!_work.IsCompleted && (_moves != seen || _isHeldUp));

        await (_work.IsCompleted ? _work : throw new TapException("filter fin timeout")); // which kills it
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
                throw new TapException($"filter {failure}");
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
                await (length > 0 ? Next.WriteAsync(buffer.AsMemory(0, length)) : default);
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

// == 12  PREREAD ====================================================================================================
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

/// <summary>Takes numbers and vectors (a length and as many bytes) off the front, in the order of the network. From the
/// first that is not all there, everything is empty.</summary>
internal ref struct Cursor(ReadOnlySpan<byte> bytes)
{
    internal ReadOnlySpan<byte> Rest { get; private set; } = bytes;
    internal bool IsCut { get; private set; }

    internal ReadOnlySpan<byte> Take(int length)
    {
        IsCut |= length > Rest.Length;
        ReadOnlySpan<byte> taken = IsCut ? default : Rest[..length];
        Rest = IsCut ? default : Rest[length..];
        return taken;
    }

    internal uint Number(int size)
    {
        uint number = 0;
        foreach (byte b in Take(size))
        {
            number = (number << 8) | b;
        }

        return number;
    }

    /// <summary>The length has <paramref name="prefix"/> bytes: one or two.</summary>
    internal ReadOnlySpan<byte> Vector(int prefix) => Take((int)Number(prefix));
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
    private const int ChecksumSize = 4;

    private static ReadOnlySpan<byte> SignatureV1 => "PROXY "u8;

    private static ReadOnlySpan<byte> SignatureV2 => "\r\n\r\n\0\r\nQUIT\n"u8;

    /// <summary>Both addresses stay null where the sender does not say: those of the connection are the client's.</summary>
    internal static int Parse(ReadOnlySpan<byte> bytes, out EndPoint? source, out EndPoint? destination, out string? wrong)
    {
        (source, destination, wrong) = (null, null, null);
        bool isV2 = bytes.CommonPrefixLength(SignatureV2) == Math.Min(bytes.Length, SignatureV2.Length);
        bool isV1 = bytes.CommonPrefixLength(SignatureV1) == Math.Min(bytes.Length, SignatureV1.Length);
        wrong = isV1 || isV2 ? null : "no PROXY header";
        return isV2 && bytes.Length >= Fixed ? ParseV2(bytes, ref source, ref destination, out wrong)
            : isV1 ? ParseV1(bytes[..Math.Min(bytes.Length, LongestV1)], ref source, ref destination, out wrong) : 0;
    }

    private static int ParseV1(ReadOnlySpan<byte> bytes, ref EndPoint? source, ref EndPoint? destination, out string? wrong)
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
        bool isTcp = words.Length == 6 && words[1] is "TCP4" or "TCP6";
        IPEndPoint? from = isTcp ? Read(words[2], words[4], words[1]) : null;
        IPEndPoint? to = isTcp ? Read(words[3], words[5], words[1]) : null;
        bool isKnown = from is not null && to is not null;
        (source, destination) = isKnown ? (from, to) : (null, null);
        wrong = isKnown || words[1] == "UNKNOWN" ? null : $"malformed PROXY header '{line}'";
        return wrong is null ? end + 2 : 0;
    }

    /// <summary>Null when it is not written as inet_ntop(3) would.</summary>
    private static IPEndPoint? Read(string address, string port, string family) =>
        address.AsSpan().IndexOfAny('%', '[', '/') < 0 && IPAddress.TryParse(address, out IPAddress? ip)
            && family == (ip.AddressFamily == AddressFamily.InterNetworkV6 ? "TCP6" : ip.ToString() == address ? "TCP4" : "")
            && Text.IsDigits(port) && port.Length <= 5 && (port[0] != '0' || port.Length == 1)
            && int.Parse(port, CultureInfo.InvariantCulture) is int number and <= Address.HighestPort
            ? new IPEndPoint(ip, number) : null;

    private static int ParseV2(ReadOnlySpan<byte> bytes, ref EndPoint? source, ref EndPoint? destination, out string? wrong)
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

        Cursor rest = new(bytes[Fixed..end]);
        if (!isLocal && family is Tcp4 or Tcp6)
        {
            IPAddress from = new(rest.Take(family == Tcp4 ? 4 : 16));
            IPAddress to = new(rest.Take(family == Tcp4 ? 4 : 16));
            source = new IPEndPoint(from, (int)rest.Number(2));
            destination = new IPEndPoint(to, (int)rest.Number(2));
        }
        else if (!isLocal && family == UnixStream)
        {
            source = ReadPath(rest.Take(UnixPath));
            destination = ReadPath(rest.Take(UnixPath));
        }

        return end;
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
        Cursor extensions = new(header[at..]);
        while (!extensions.Rest.IsEmpty)
        {
            bool isChecksum = extensions.Number(1) == ChecksumType;
            Cursor value = new(extensions.Vector(2));
            if (extensions.IsCut)
            {
                return "PROXY header with a cut extension";
            }

            int field = header.Length - extensions.Rest.Length - ChecksumSize;
            if (isChecksum && (value.Rest.Length != ChecksumSize || value.Number(ChecksumSize) != Checksum(header, field)))
            {
                return "PROXY header with a wrong checksum";
            }
        }

        return null;
    }

    /// <summary>CRC-32C with the four bytes of the checksum itself taken as 0.</summary>
    private static uint Checksum(ReadOnlySpan<byte> header, int field)
    {
        uint crc = uint.MaxValue;
        for (int i = 0; i < header.Length; i++)
        {
            crc = BitOperations.Crc32C(crc, i >= field && i < field + ChecksumSize ? (byte)0 : header[i]);
        }

        return ~crc;
    }

    /// <summary>Writes a header of <see cref="LongestWritten"/> bytes at most and returns its length. Without addresses it
    /// is one that speaks for nobody, as a health check wants it: LOCAL, in version 1 UNKNOWN. As HAProxy does, addresses
    /// of two families are both written as IPv6, in version 1 as UNKNOWN.</summary>
    internal static int Write(Span<byte> to, ProxyVersion version, EndPoint? source, EndPoint? destination)
    {
        (IPAddress? from, IPAddress? at) = (Address.Of(source), Address.Of(destination));
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
        int taken = Gather(bytes, message, out int length, out wrong);
        if (taken > 0 && !Find(message.AsSpan(MessageHeader, length), ref name))
        {
            (taken, wrong) = (0, "a malformed TLS hello");
        }

        ArrayPool<byte>.Shared.Return(message);
        return taken;
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
    private static bool Find(ReadOnlySpan<byte> message, ref string? name)
    {
        const int VersionAndRandom = 34; // bytes
        Cursor hello = new(message);
        if (hello.Take(VersionAndRandom) is not [3, ..])
        {
            return false;
        }

        hello.Vector(1); // the session
        hello.Vector(2); // ciphers
        hello.Vector(1); // compression
        Cursor extensions = new(hello.Rest.IsEmpty ? default : hello.Vector(2)); // TLS 1.2 may do without
        while (!extensions.Rest.IsEmpty)
        {
            bool isName = extensions.Number(2) == 0;
            Cursor extension = new(extensions.Vector(2));
            if (isName)
            {
                Cursor list = new(extension.Vector(2)); // of one name, of the one type that there is: 0
                name = list.Number(1) == 0 ? Read(Encoding.UTF8.GetString(list.Vector(2))) : null;
                return name is not null;
            }
        }

        return !hello.IsCut && !extensions.IsCut;
    }

    /// <summary>In lower case; null when it is none.</summary>
    private static string? Read(string name)
    {
        const int Longest = 253; // characters: RFC 1035, 2.3.4, as text
        bool isName = name.Length is > 0 and <= Longest && name[0] != '.' && name[^1] != '.'
            && !name.Contains("..", StringComparison.Ordinal);
        foreach (char c in name)
        {
            isName &= char.IsAsciiLetterOrDigit(c) || c is '-' or '.' or '_';
        }

        return isName ? name.ToLowerInvariant() : null;
    }

    /// <summary>NAME[,NAME...], each of which may be *.NAME.</summary>
    /// <exception cref="FormatException">one is no name</exception>
    internal static string[] ParseList(string text) => Array.ConvertAll(text.Split(','), word =>
        word.StartsWith("*.", StringComparison.Ordinal) && Read(word[2..]) is { } parent ? $"*.{parent}"
        : Read(word) ?? throw new FormatException($"'{word}' is not a server name; write www.example.com or *.example.com"));
}

internal sealed class PrereadSettings
{
    private Network[] _senders = [];

    internal TimeSpan Timeout { get; set; } // zero = off
    internal bool HasSenders => _senders.Length > 0;

    internal PrereadSettings Clone() => (PrereadSettings)MemberwiseClone();

    /// <summary>Who must send a PROXY header: CIDR[,CIDR...], where unix stands for whoever comes by a unix socket.</summary>
    /// <exception cref="FormatException">one is no network</exception>
    internal void AcceptProxy(string text) =>
        _senders = Array.ConvertAll(text == "off" ? [] : text.Split(','), Network.Parse);

    internal bool IsSender(EndPoint? client)
    {
        Network address = Network.Of(client);
        return Array.Exists(_senders, sender => sender.Has(address));
    }
}

/// <summary>Closes a socket that is waited for in vain: it is late, or the process ends. Whoever is first says so.</summary>
internal class Patience(Socket? socket, long deadline, CloseReason stopped) : Watched
{
    private CloseReason? _end; // Done: it came in time

    internal Socket? Socket { get; private protected set; } = socket; // not owned
    internal CloseReason Late { get; set; } = CloseReason.ConnectTimeout;

    /// <summary>What was waited for has happened. Null, or why the socket was closed before.</summary>
    internal CloseReason? Done()
    {
        Sweep.Remove(this);
        return Interlocked.CompareExchange(ref _end, CloseReason.Done, null);
    }

    internal override bool Check(long now)
    {
        if (now >= deadline)
        {
            End(Late);
        }

        return true;
    }

    internal override void Stop() => End(stopped);

    private protected void End(CloseReason reason)
    {
        if (Interlocked.CompareExchange(ref _end, reason, null) is null)
        {
            Sweep.Remove(this);
            Socket?.Close(0); // a reset, which also makes the pending connect, receive or send end
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

    internal byte[] Copy(int length) => length == 0 ? [] : _buffer.AsSpan(_start, length).ToArray(); // there may be no buffer yet

    /// <summary>Null when all that was asked for has come.</summary>
    internal async Task<CloseReason?> ReadAsync(Socket client, bool isHeader, bool isHello, TimeSpan time)
    {
        Patience patience = new(client, Watched.Deadline(time), CloseReason.StoppedReading);
        patience.Late = isHeader ? CloseReason.HeaderTimeout : CloseReason.HelloTimeout;
        Sweep.Add(patience);
        CloseReason? refusal = null;
        try
        {
            await client.ReceiveAsync(Memory<byte>.Empty, SocketFlags.None); // who says nothing holds no buffer
            while (refusal is null && (isHeader || isHello))
            {
                Grow();
                int length = await client.ReceiveAsync(_buffer.AsMemory(_end), SocketFlags.None);
                _end += length;
                refusal = length == 0 ? new("CR", $"client closed before the end of the {What(isHeader)}")
                    : Understand(ref isHeader, ref isHello)
                    ?? (_end >= Most && (isHeader || isHello) ? new("PR", $"{What(isHeader)} too long") : null);
                patience.Late = isHeader ? CloseReason.HeaderTimeout : CloseReason.HelloTimeout;
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            refusal = new("CR", "client reset");
        }

        return patience.Done() ?? refusal;
    }

    private static string What(bool isHeader) => isHeader ? "PROXY header" : "TLS hello";

    private CloseReason? Understand(ref bool isHeader, ref bool isHello)
    {
        if (isHeader)
        {
            int taken = ProxyHeader.Parse(
                _buffer.AsSpan(_start, Length), out EndPoint? source, out EndPoint? destination, out string? wrong);
            if (wrong is not null)
            {
                return new CloseReason("PR", wrong, kind: "wrong PROXY header");
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
    internal async Task<CloseReason?> SendAsync(Socket target, int length, TimeSpan time)
    {
        Patience patience = new(target, Watched.Deadline(time), CloseReason.StoppedConnecting);
        Sweep.Add(patience);
        CloseReason? failure = null;
        try
        {
            await target.SendAsync(_buffer.AsMemory(_start, length), SocketFlags.None);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            failure = CloseReason.UpstreamReset;
        }

        return patience.Done() ?? failure;
    }
}

// == 13  OPERATE ====================================================================================================
// What those who run the proxy see of it and tell it: the page and the numbers of --stats, the connections of --control, and
// whoever has started us and wants to know how we are. They look at the counters of OBSERVE; none of it is on the data path.

/// <summary>For those who look, not for traffic: a few clients at once, and who is slow is cut off.</summary>
internal abstract class SideServer(int most, Log log)
{
    private int _clients;

    protected Log Log { get; } = log;

    /// <summary>The socket is ours (rule 1).</summary>
    internal void Accepted(Socket client)
    {
        if (Interlocked.Increment(ref _clients) <= most)
        {
            _ = RunAsync(client);
            return;
        }

        Interlocked.Decrement(ref _clients);
        client.Close(0);
    }

    /// <summary>Who takes longer than <paramref name="time"/> has left is cut off.</summary>
    protected abstract Task ServeAsync(Socket client, CancellationTokenSource time);

    private async Task RunAsync(Socket client)
    {
        try
        {
            using CancellationTokenSource time = new();
            await ServeAsync(client, time);
        }
        catch (Exception e) when (e is SocketException or OperationCanceledException)
        {
            client.Close(0); // it has left, or was too slow
        }
#pragma warning disable CA1031 // the last line of defence: who looks must not end the proxy
        catch (Exception e)
#pragma warning restore CA1031
        {
            Log.Event(LogLevel.Error, "internal-error", e.ToString());
        }
        finally
        {
            Interlocked.Decrement(ref _clients); // before the client can see its end, and come again
            client.Dispose();
        }
    }
}

// ---- --stats

/// <summary>--stats: an HTTP server of four pages, one request a connection. A thread of its own samples and writes all
/// answers, and rests four times as long as it has worked, up to two seconds: no crowd of visitors takes a processor from the
/// traffic.</summary>
internal sealed class StatsServer(IObserved proxy, Log log) : SideServer(most: 64, log)
{
    private const int RequestTime = 5000; // ms
    private const int AnswerTime = 10_000;
    private const int LongestRequest = 8 << 10; // bytes
    private const int Pause = 4; // times what its work has taken

    private readonly Queue<Request> _waiting = []; // under itself
    private long _samples; // taken so far

    internal void Start() => new Thread(Run, 256 << 10) { IsBackground = true, Name = "stats" }.Start();

    protected override async Task ServeAsync(Socket client, CancellationTokenSource time)
    {
        const int Trailing = 8; // buffers that may still come of a request, say its body: unread they would reset the answer
        byte[] buffer = new byte[LongestRequest];
        int length = 0;
        time.CancelAfter(RequestTime);
        for (int received = 1; received > 0 && length < buffer.Length && buffer.AsSpan(0, length).IndexOf("\r\n\r\n"u8) < 0;
            length += received)
        {
            received = await client.ReceiveAsync(buffer.AsMemory(length), SocketFlags.None, time.Token);
        }

        if (length > 0)
        {
            time.CancelAfter(AnswerTime);
            Request request = new(Encoding.Latin1.GetString(buffer, 0, length),
                isLocal: client.LocalEndPoint is IPEndPoint { Address: var address } && IPAddress.IsLoopback(address));
            lock (_waiting)
            {
                _waiting.Enqueue(request);
                Monitor.Pulse(_waiting);
            }

            await client.SendAsync(await request.Task, SocketFlags.None, time.Token);
            client.Shutdown(SocketShutdown.Send);
            for (int i = 0; i < Trailing && await client.ReceiveAsync(buffer, SocketFlags.None, time.Token) > 0; i++)
            {
            }
        }
    }

    /// <summary>Waits for the bytes of its answer.</summary>
    private sealed class Request(string text, bool isLocal) : TaskCompletionSource<byte[]>
    {
        internal string Text { get; } = text; // all of it, or what has come
        internal bool IsLocal { get; } = isLocal;
    }

    // ---- the thread

    private void Run()
    {
        const int Interval = 1000 * Series.Interval;
        long next = Environment.TickCount64;
        double tired = 0; // ms
        while (true)
        {
            Request? request;
            lock (_waiting)
            {
                int pause = (int)Math.Max(0, next - Environment.TickCount64);
                if (_waiting.Count == 0 && pause > 0)
                {
                    Monitor.Wait(_waiting, pause);
                }

                _waiting.TryDequeue(out request);
            }

            long began = Stopwatch.GetTimestamp();
            try
            {
                if (Environment.TickCount64 >= next)
                {
                    next = Math.Max(next, Environment.TickCount64 - Interval) + Interval;
                    new Totals(proxy).Routes.ForEach(route => route.Sample(_samples));
                    _samples++;
                }

                request?.SetResult(Answer(request));
            }
#pragma warning disable CA1031 // a surprise on this page must not end the proxy
            catch (Exception e)
#pragma warning restore CA1031
            {
                Log.Event(LogLevel.Error, "internal-error", e.ToString());
                request?.TrySetResult("HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\n\r\n"u8.ToArray());
            }

            tired += Pause * Stopwatch.GetElapsedTime(began).TotalMilliseconds;
            tired = Math.Min(tired, Interval); // the process may have stood still
            Thread.Sleep((int)tired);
            tired -= (int)tired;
        }
    }

    // ---- HTTP

    /// <summary>Of RFC 9112 what browsers, curl and Prometheus need; whoever asks otherwise is told so.</summary>
    private byte[] Answer(Request request)
    {
        LogText body = new(LogFormat.Json);
        string type = "text/plain";
        bool isWhole = request.Text.Contains("\r\n\r\n", StringComparison.Ordinal);
        string[] lines = request.Text.Split("\r\n");
        string[] words = lines[0].Split(' ');
        string status = !isWhole && request.Text.Length == LongestRequest ? "431 Request Header Fields Too Large"
            : !isWhole || words.Length != 3 || words[2] is not ("HTTP/1.1" or "HTTP/1.0") ? "400 Bad Request"
            : words[0] is not ("GET" or "HEAD") ? "405 Method Not Allowed\r\nAllow: GET, HEAD"
            : request.IsLocal && IsForeign(lines) ? "421 Misdirected Request"
            : Write(body, words[1], ref type);
        if (body.Bytes.Length == 0)
        {
            body.Append($"{status.Split('\r')[0]}\n");
        }

        byte[] head = Encoding.UTF8.GetBytes($"HTTP/1.1 {status}\r\nContent-Type: {type}; charset=utf-8\r\nContent-Length: "
            + $"{Text.Of(body.Bytes.Length)}\r\nConnection: close\r\nCache-Control: no-store\r\n"
            + "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\n"
            + "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src "
            + "'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n\r\n");
        return words[0] == "HEAD" ? head : [.. head, .. body.Bytes];
    }

    /// <summary>A page from elsewhere can make its own name mean this machine (DNS rebinding), and ask in the reader's browser.
    /// What asks at a loopback address by a name with a dot is one.</summary>
    private static bool IsForeign(string[] lines)
    {
        const string Header = "host:";
        string host = Array.Find(lines, line => line.StartsWith(Header, StringComparison.OrdinalIgnoreCase)) ?? Header;
        host = host[Header.Length..].Trim();
        int port = host.LastIndexOf(':');
        string name = port < 0 || host.EndsWith(']') ? host : host[..port];
        return name.Contains('.', StringComparison.Ordinal) && !IPAddress.TryParse(name, out _)
            && !name.EndsWith(".localhost", StringComparison.OrdinalIgnoreCase);
    }

    /// <summary>Returns the status.</summary>
    private string Write(LogText body, string target, ref string type)
    {
        string[] parts = target.Split('?');
        switch (parts[0])
        {
            case "/":
                type = "text/html";
                body.Append(StatsPage.Html);
                return "200 OK";
            case "/stats.json":
                type = "application/json";
                new StatsPage(proxy, Log, body, parts.Length > 1 ? parts[1].Split('&') : []).WriteJson(_samples);
                return "200 OK";
            case "/metrics":
                type = "text/plain; version=0.0.4";
                new StatsPage(proxy, Log, body).WriteMetrics();
                return "200 OK";
            case "/healthz":
                string? illness = StatsPage.Illness(proxy, proxy.Look());
                body.Append($"{illness ?? "ok"}\n");
                return illness is null ? "200 OK" : "503 Service Unavailable";
            default:
                return "404 Not Found";
        }
    }
}

/// <summary>What the pages of <see cref="StatsServer"/> say. The query is for JSON: since=N is the first sample that is wanted,
/// sessions=new asks for the youngest.</summary>
internal sealed class StatsPage(IObserved proxy, Log log, LogText text, params string[] query)
{
    private const int MostSessions = 50;

    private readonly Totals _totals = new(proxy, MostSessions, Array.IndexOf(query, "sessions=new") >= 0);

    /// <summary>Null when all is well.</summary>
    internal static string? Illness(IObserved proxy, List<RouteStats> routes) => proxy.IsDraining ? "draining"
        : routes.Find(route => route.IsInForce && !route.Servers.Exists(server => server.State == "up")) is { } route
            ? $"route {Text.Escape(route.Title)} has no server up" : null;

    // ---- JSON

    internal void WriteJson(long samples)
    {
        const string Since = "since=";
        string since = Array.Find(query, word => word.StartsWith(Since, StringComparison.Ordinal)) ?? Since;
        _ = long.TryParse(since.AsSpan(Since.Length), NumberStyles.None, null, out long wanted); // 0 where there is none
        long first = Math.Clamp(wanted, Math.Max(0, samples - Series.Length), samples);
        text.Begin();
        text.Add("version", proxy.Version);
        text.Add("pid", Environment.ProcessId);
        text.Add("started", Text.Of(proxy.StartedAt));
        text.Add("now", Text.Of(DateTime.UtcNow));
        text.Add("uptime_s", (long)(DateTime.UtcNow - proxy.StartedAt).TotalSeconds);
        text.Add("draining", proxy.IsDraining);
        text.Add("health", Illness(proxy, _totals.Routes) ?? "ok");
        text.Add("resident_bytes", Usage.Resident);
        text.Add("cpu_ms", (long)Environment.CpuUsage.TotalTime.TotalMilliseconds);
        text.Add("log_dropped", log.DroppedInAll);
        text.Add("interval_s", Series.Interval);
        text.Add("samples", samples);
        text.Add("current", _totals.Running);
        Objects("routes", _totals.Routes, route => WriteRoute(route, first, samples));
        Objects("sessions", _totals.Sessions, WriteSession);
        text.End();
    }

    private void WriteRoute(RouteStats route, long first, long samples)
    {
        WriteCounters(route);
        text.Add("in_force", route.IsInForce);
        text.Add("refused", route.Refused);
        text.Add("queued", route.Queued);
        WriteHistogram("connect_time", route.ConnectTime);
        WriteHistogram("duration", route.Duration);
        Objects("ends", [.. route.Ends], end =>
        {
            text.Add("end", end.Code);
            text.Add("reason", end.Words);
            text.Add("count", Volatile.Read(ref end.Count));
            text.Add("recent", end.Recent?.Sum() ?? 0);
        });
        Objects("servers", route.Servers, WriteServer);
        text.Open("{", "history");
        for (int i = 0; i < route.History.Length; i++)
        {
            Series series = route.History[i];
            Numbers(RouteStats.HistoryKeys[i], (int)(samples - first), sample => series[first + sample]);
        }

        text.Close("}");
    }

    private void WriteCounters(Counters counters)
    {
        text.Add("name", counters.Name);
        text.Add("connections", counters.Connections);
        text.Add("current", counters.Current);
        text.Add("max_current", counters.Most);
        text.Add("limit", counters.MaxConnections);
        text.Add("bytes_up", counters.BytesUp);
        text.Add("bytes_down", counters.BytesDown);
        text.Add("connect_failures", counters.ConnectFailures);
        text.Add("retries", counters.Retries);
        text.Add("client_resets", counters.ClientResets);
        text.Add("server_resets", counters.ServerResets);
    }

    private void WriteServer(ServerStats server)
    {
        WriteCounters(server);
        text.Add("address", server.Address);
        text.Add("state", server.State);
        text.Add("since", Text.Of(server.Since));
        text.Add("downs", server.Downs);
        text.Add("weight", server.Weight);
        text.Add("backup", server.IsBackup);
        text.Add("check", server.Check);
        text.Add("last_failure", server.LastFailure);
        text.Add("last_failed", server.LastFailedAt == default ? "" : Text.Of(server.LastFailedAt));
        text.Add("connect_time_us", server.ConnectMicroseconds);
    }

    private void WriteHistogram(string name, Histogram histogram)
    {
        text.Open("{", name);
        Numbers("le_us", histogram.Bounds.Length, i => histogram.Bounds[i]);
        Numbers("counts", histogram.Bounds.Length + 1, histogram.CountAt);
        text.Add("sum_us", histogram.Sum);
        text.Close("}");
    }

    private void WriteSession(ISession session)
    {
        text.Add("id", $"0x{session.Line.Id:x}"); // as control calls it
        text.Add("route", session.Line.RouteStats.Name);
        text.Add("client", Text.Of(session.Line.Client));
        text.Add("server", session.Line.ServerStats?.Title ?? "-");
        text.Add("address", Text.Of(session.Line.Address));
        text.Add("age_ms", (long)session.Line.Age.TotalMilliseconds);
        text.Add("bytes_up", session.BytesUp);
        text.Add("bytes_down", session.BytesDown);
    }

    private void Objects<T>(string key, List<T> items, Action<T> write)
        where T : class
    {
        text.Open("[", key);
        foreach (T item in items)
        {
            text.Open("{");
            write(item);
            text.Close("}");
        }

        text.Close("]");
    }

    private void Numbers(string key, int count, Func<int, long> number)
    {
        text.Open("[", key);
        for (int i = 0; i < count; i++)
        {
            text.Add(number(i));
        }

        text.Close("]");
    }

    // ---- Prometheus, text format 0.0.4

    internal void WriteMetrics()
    {
        OfRoutes("frontend_connections_total", "Connections accepted.", route => route.Connections);
        OfRoutes("frontend_current_sessions", "Connections now.", route => route.Current);
        OfRoutes("frontend_max_sessions", "Most connections at once so far.", route => route.Most);
        OfRoutes("frontend_limit_sessions", "Most connections allowed; 0 is any number.", route => route.MaxConnections);
        OfRoutes("frontend_denied_connections_total", "Connections refused by access rules, limits, rates or full queues.",
            route => route.Refused);
        OfRoutes("frontend_bytes_in_total", "Bytes received from clients.", route => route.BytesUp);
        OfRoutes("frontend_bytes_out_total", "Bytes sent to clients.", route => route.BytesDown);
        Family("frontend_ends_total", "Connections ended, by HAProxy's two letters and reason.");
        foreach (RouteStats route in _totals.Routes)
        {
            foreach (EndCount end in route.Ends)
            {
                Sample("frontend_ends_total", $"{Label(route)},end={Quote(end.Code)},reason={Quote(end.Words)}",
                    Text.Of(end.Count));
            }
        }

        OfHistograms("frontend_session_duration_seconds", "How long connections with a server lasted.", route => route.Duration);
        OfHistograms("backend_connect_time_seconds", "How long connecting to servers took.", route => route.ConnectTime);
        OfRoutes("backend_current_queue", "Clients waiting for room.", route => route.Queued);
        OfRoutes("backend_connection_errors_total", "Connects to servers that failed.", route => route.ConnectFailures);
        OfRoutes("backend_retry_warnings_total", "Connects tried again at another server.", route => route.Retries);
        OfRoutes("backend_client_aborts_total", "Connections reset by clients.", route => route.ClientResets);
        OfRoutes("backend_server_aborts_total", "Connections reset by servers.", route => route.ServerResets);
        OfRoutes("backend_active_servers", "Servers that take connections.",
            route => route.Servers.FindAll(server => server.State == "up").Count);

        Family("server_status", "1 for the state that the server is in, 0 for the others.");
        string[] states = ["up", "down", "drain", "maint"];
        EachServer(server => Array.ForEach(states, state =>
            Sample("server_status", $"{Label(server)},state=\"{state}\"", server.State == state ? "1" : "0")));
        Family("server_last_change_timestamp_seconds", "When the server came up or went down, since the epoch.");
        EachServer(server => Sample("server_last_change_timestamp_seconds", Label(server), Epoch(server.Since)));
        OfServers("server_weight", "Share of the connections.", server => server.Weight);
        OfServers("server_current_sessions", "Connections now.", server => server.Current);
        OfServers("server_max_sessions", "Most connections at once so far.", server => server.Most);
        OfServers("server_limit_sessions", "Most connections allowed; 0 is any number.", server => server.MaxConnections);
        OfServers("server_sessions_total", "Connections made.", server => server.Connections);
        OfServers("server_bytes_in_total", "Bytes of clients for the server.", server => server.BytesUp);
        OfServers("server_bytes_out_total", "Bytes of the server for clients.", server => server.BytesDown);
        OfServers("server_connection_errors_total", "Connects that failed.", server => server.ConnectFailures);
        OfServers("server_retry_warnings_total", "Failed connects after which another server was tried.",
            server => server.Retries);
        OfServers("server_client_aborts_total", "Connections reset by clients.", server => server.ClientResets);
        OfServers("server_server_aborts_total", "Connections reset by the server.", server => server.ServerResets);
        OfServers("server_check_up_down_total", "How often the server went down.", server => server.Downs);
        Family("server_connect_time_seconds", "How long connecting to the server took.", "summary");
        EachServer(server =>
        {
            Sample("server_connect_time_seconds_sum", Label(server), Seconds(server.ConnectMicroseconds));
            Sample("server_connect_time_seconds_count", Label(server), Text.Of(server.Connections));
        });

        Single("build_info", "The version.", "1", $"version={Quote(proxy.Version)}");
        Single("process_start_time_seconds", "When the process started, since the epoch.", Epoch(proxy.StartedAt));
        Single("process_cpu_seconds_total", "Processor time.", Seconds((long)Environment.CpuUsage.TotalTime.TotalMicroseconds));
        Known("process_resident_memory_bytes", "Resident memory.", Usage.Resident);
        Known("process_open_fds", "Open descriptors.", Usage.OpenDescriptors);
        Known("process_max_fds", "Descriptors allowed.", Descriptors.Limit);
        Single("process_stopping", "Whether the process drains.", proxy.IsDraining ? "1" : "0");
        Single("process_log_dropped_lines_total", "Log lines that nobody read in time, or that could not be written.",
            Text.Of(log.DroppedInAll));
    }

    private void Family(string name, string help, string? type = null)
    {
        type ??= name.EndsWith("_total", StringComparison.Ordinal) ? "counter" : "gauge";
        text.Append($"# HELP tcpproxy_{name} {help}\n# TYPE tcpproxy_{name} {type}\n");
    }

    private void Sample(string name, string labels, string value) =>
        text.Append(labels.Length == 0 ? $"tcpproxy_{name} {value}\n" : $"tcpproxy_{name}{{{labels}}} {value}\n");

    private void Single(string name, string help, string value, string labels = "")
    {
        Family(name, help);
        Sample(name, labels, value);
    }

    private void Known(string name, string help, long value)
    {
        if (value > 0)
        {
            Single(name, help, Text.Of(value));
        }
    }

    private void OfRoutes(string name, string help, Func<RouteStats, long> value)
    {
        Family(name, help);
        _totals.Routes.ForEach(route => Sample(name, Label(route), Text.Of(value(route))));
    }

    private void EachServer(Action<ServerStats> action) => _totals.Routes.ForEach(route => route.Servers.ForEach(action));

    private void OfServers(string name, string help, Func<ServerStats, long> value)
    {
        Family(name, help);
        EachServer(server => Sample(name, Label(server), Text.Of(value(server))));
    }

    private void OfHistograms(string name, string help, Func<RouteStats, Histogram> of)
    {
        Family(name, help, "histogram");
        foreach (RouteStats route in _totals.Routes)
        {
            Histogram histogram = of(route);
            long sum = histogram.Sum;
            long count = 0;
            for (int i = 0; i <= histogram.Bounds.Length; i++)
            {
                count += histogram.CountAt(i);
                string bound = i < histogram.Bounds.Length ? Seconds(histogram.Bounds[i]) : "+Inf";
                Sample($"{name}_bucket", $"{Label(route)},le=\"{bound}\"", Text.Of(count));
            }

            Sample($"{name}_sum", Label(route), Seconds(sum));
            Sample($"{name}_count", Label(route), Text.Of(count));
        }
    }

    private static string Label(RouteStats route) => $"route={Quote(route.Name)}";

    private static string Label(ServerStats server) => $"{Label(server.RouteStats)},server={Quote(server.Name)}";

    /// <summary>The format knows these three escapes and no other.</summary>
    private static string Quote(string value) => $"\"{value.Replace("\\", "\\\\", StringComparison.Ordinal)
        .Replace("\"", "\\\"", StringComparison.Ordinal).Replace("\n", "\\n", StringComparison.Ordinal)}\"";

    private static string Epoch(DateTime utc) => Seconds((utc.Ticks - DateTime.UnixEpoch.Ticks) / TimeSpan.TicksPerMicrosecond);

    /// <summary>Microseconds as seconds.</summary>
    private static string Seconds(long time) =>
        $"{Text.Of(time / 1_000_000)}.{Text.Of(time % 1_000_000).PadLeft(6, '0')}".TrimEnd('0').TrimEnd('.');

    // ---- the page

    internal static ReadOnlySpan<byte> Html => """
<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>tcpproxy</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='none'
 stroke='%233b6fe0' stroke-width='2'><path d='M2 5h10l-3-3m5 9H4l3 3'/></svg>">
<style>
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #1b2330; --dim: #68717f; --line: #e6e9ee; --soft: #f2f4f7;
  --up: #d9822b; --down: #2f6fde; --now: #7a5cc9; --good: #1c9a5b; --warn: #b97d00; --bad: #d0383b }
@media (prefers-color-scheme: dark) { :root { --page: #0e1217; --card: #161b22; --ink: #e3e8ef; --dim: #8a94a3; --line: #252c36;
  --soft: #1c222b; --up: #f0a04b; --down: #6aa0ff; --now: #a78bfa; --good: #3fb977; --warn: #e0a83a; --bad: #f26d6d } }
* { box-sizing: border-box; margin: 0 }
body { background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  max-width: 1180px; margin: auto; padding: 20px }
b { font-weight: 600 }
header, h2, .facts, .legend { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px }
header { margin-bottom: 16px }
h1 { font-size: 20px; font-weight: 650; letter-spacing: -.02em }
h2 { font-size: 15px; font-weight: 650; overflow-wrap: anywhere }
h3 { font-size: 12px; font-weight: 600; color: var(--dim); margin: 0 0 4px }
.dim, .facts, .legend, th { color: var(--dim); font-weight: 400; font-size: 12px }
.facts { margin-left: auto } .facts b { color: var(--ink) }
.pill { border-radius: 99px; padding: 1px 10px; font-size: 12px; font-weight: 600; color: var(--c);
  background: color-mix(in srgb, var(--c) 14%, transparent) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; margin-bottom: 12px;
  min-width: 0 }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px } .tiles + * { margin-top: 12px }
.tile { padding: 12px 0 0; overflow: hidden; margin: 0 } .tile > div { padding: 0 16px }
.tile strong { font-size: 22px; font-weight: 650; letter-spacing: -.02em }
.cols { display: grid; grid-template-columns: 2fr 1fr 1fr; gap: 8px 24px; margin: 10px 0 }
.main { display: grid; grid-template-columns: minmax(0, 1fr) 270px; gap: 16px 28px }
svg { display: block; width: 100%; height: 56px; overflow: visible; border-bottom: 1px solid var(--line) }
.tile svg { height: 44px; border: 0 }
path { fill: none; stroke: var(--c); stroke-width: 1.5; vector-effect: non-scaling-stroke; stroke-linejoin: round }
.area { fill: var(--c); fill-opacity: .13; stroke: none } .mark { stroke: var(--dim); stroke-dasharray: 2 2 }
.legend { margin-bottom: 4px; min-height: 18px } .legend > :last-child { margin-left: auto }
.legend i { display: inline-block; width: 8px; height: 8px; border-radius: 2px; background: var(--c); margin-right: 5px }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { text-align: right; white-space: nowrap; padding: 0 0 3px 12px; min-width: 62px } .l { text-align: left }
td { padding: 4px 0 4px 12px; border-top: 1px solid var(--line) }
td small { font-size: 12px; color: var(--dim); margin-left: 6px }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td:first-child { width: 100%; max-width: 0; overflow: hidden; text-overflow: ellipsis }
.even td:first-child { width: auto; max-width: none }
.dot { display: inline-block; width: 8px; height: 8px; border-radius: 50%; background: var(--c); margin-right: 8px }
.end { display: flex; gap: 8px; font-size: 13px; align-items: baseline }
.end code { color: var(--c); font: 600 12px ui-monospace, monospace; width: 18px }
.end :nth-child(2) { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.bar { height: 4px; border-radius: 2px; background: var(--soft); margin: 2px 0 7px }
.bar i { display: block; height: 4px; border-radius: 2px; background: var(--c); min-width: 2px }
button { font: inherit; font-size: 12px; color: var(--dim); background: none; border: 0; border-radius: 6px; padding: 2px 8px;
  cursor: pointer }
button.on, button:hover { background: var(--soft); color: var(--ink) } .old main { opacity: .45 }
.zero { color: var(--dim); opacity: .55 }
@media (max-width: 760px) { body { padding: 12px } .card { padding: 12px } .tile { padding: 10px 0 0 } .wide { display: none }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px } .main { grid-template-columns: minmax(0, 1fr) } .facts { margin-left: 0 }
  .cols { grid-template-columns: 1fr 1fr } .cols > :first-child { grid-column: span 2 } th, td { min-width: 0 } }
</style>
<header></header>
<main><noscript>This page draws itself. The same numbers: <a href="stats.json">stats.json</a>, <a href="metrics">metrics</a>.
</noscript></main>
<script>
'use strict'
const KEEP = 150 // samples
const $ = (tag, attributes = {}, ...children) => { // names are anybody's: they go in as text, never as markup
  const e = tag[0] == '-' ? document.createElementNS('http://www.w3.org/2000/svg', tag.slice(1)) : document.createElement(tag)
  for (const key in attributes) key == 'click' ? e.onclick = attributes[key] : e.setAttribute(key, attributes[key])
  e.append(...children.flat().filter(child => child != null))
  return e
}
const color = name => ({ style: `--c: var(--${name})` })

// ---- numbers as text
const scale = (n, units) => {
  let i = 0
  for (; n >= 999.5 && i < units.length - 1; i++) n /= 1000
  return n.toFixed(n >= 100 || n % 1 == 0 && !i ? 0 : 1) + units[i]
}
const count = n => n >= 1e5 ? scale(n, ['', ' k', ' M', ' G']) : n % 1 ? n.toFixed(1) : n.toLocaleString('en')
const bytes = n => scale(n, [' B', ' kB', ' MB', ' GB', ' TB', ' PB'])
const rate = n => bytes(n) + '/s', perSecond = n => count(n) + '/s'
const span = s => s < 10 ? `${+s.toFixed(1)} s` : s < 60 ? `${s | 0} s` : s < 3600 ? `${s / 60 | 0} m ${s % 60 | 0} s`
  : s < 86400 ? `${s / 3600 | 0} h ${s / 60 % 60 | 0} m` : `${s / 86400 | 0} d ${s / 3600 % 24 | 0} h`
const cell = (n, text = count) => $('span', n ? {} : { class: 'zero' }, n ? text(n) : '0')
const last = list => list[list.length - 1] ?? 0

// ---- parts of the page
function graph(text, ...lines) { // of [name, color, values], all on one scale from 0, the newest on the right
  const top = Math.max(...lines.flatMap(line => line[2]), 1e-9)
  const svg = $('-svg', { viewBox: `0 0 ${KEEP - 1} 30`, preserveAspectRatio: 'none' })
  for (const [, hue, values] of lines) {
    const from = KEEP - values.length
    const path = values.map((v, i) => `${from + i} ${(30 - v / top * 28).toFixed(2)}`).join('L')
    if (path) svg.append($('-path', { class: 'area', d: `M${from} 30L${path}L${KEEP - 1} 30`, ...color(hue) }),
      $('-path', { d: 'M' + path, ...color(hue) }))
  }
  svg.lines = lines
  svg.text = text
  svg.caption = $('div', { class: 'legend' }, lines.map(([name, hue, values]) =>
    $('span', {}, $('i', color(hue)), name, ' ', $('b', {}, text(last(values))))),
    $('span', {}, `max ${text(top < 1e-6 ? 0 : top)}`, $('span', { class: 'wide' }, ' in 5 min')))
  return svg
}
function tile(title, text, hue, values) {
  const svg = graph(text, ['', hue, values])
  svg.caption = $('h3', {}, title)
  return $('div', { class: 'card tile' }, $('div', {}, svg.caption, $('strong', {}, text(last(values)))), svg)
}
const facts = (...pairs) => $('span', { class: 'facts' },
  pairs.filter(Boolean).map(([n, what]) => $('span', {}, $('b', {}, n), ' ', what)))
const table = (heads, rows, style = '') => $('div', { class: 'scroll' }, $('table', { class: style },
  $('tr', {}, heads.map(([title, kind = '']) => $('th', { class: kind }, title))),
  rows.map(cells => $('tr', {}, cells.map((content, i) => $('td', { class: heads[i][1] ?? '' }, content ?? ''))))))

const FEW = 12, opened = new Set
function servers(route) {
  const rank = { down: 0, drain: 1, maint: 1, up: 2 }, hue = { up: 'good', down: 'bad', drain: 'warn', maint: 'now' }
  const isOpen = opened.has(route.name), all = [...route.servers]
  if (all.length > FEW && !isOpen) all.sort((a, b) => rank[a.state] - rank[b.state] || b.current - a.current)
  const row = s => {
    const why = s.check && s.check != 'passed' ? s.check : s.last_failure
    const note = s.state == 'up' ? s.backup ? 'backup' : '' : s.state + (s.state == 'down' && why ? ` · ${why}` : '')
    const title = `${s.address}, ${s.state} since ${s.since}` + (s.check && `; check: ${s.check}`)
      + (s.last_failure && `; last failure: ${s.last_failure} ${s.last_failed}`)
    return [$('span', { title }, $('i', { class: 'dot', ...color(hue[s.state]) }), s.name, $('small', {}, note)), cell(s.current),
      cell(s.connections), cell(s.bytes_up, bytes), cell(s.bytes_down, bytes),
      cell(s.connections && s.connect_time_us / s.connections, us => `${(us / 1000).toFixed(1)} ms`),
      cell(s.connect_failures), s.weight]
  }
  const heads = [['server'], ['now'], ['total'], ['↑', 'wide'], ['↓'], ['connect', 'wide'], ['failed'], ['weight', 'wide']]
  return $('div', {}, table(heads, (isOpen ? all : all.slice(0, FEW)).map(row)), all.length > FEW ? $('button', {
      click: () => { isOpen ? opened.delete(route.name) : opened.add(route.name); render() } },
      isOpen ? 'fewer' : `all ${all.length} servers`) : null)
}
function ends(route) {
  const hue = ([who]) => ({ '-': 'good', S: 'bad', I: 'bad', R: 'bad', P: 'now', K: 'dim' })[who] ?? 'warn'
  const list = route.ends.filter(e => e.count).sort((a, b) => b.recent - a.recent || b.count - a.count).slice(0, 8)
  const most = Math.max(1, ...list.map(e => e.recent))
  return $('div', {}, $('h3', {}, 'ends, last 5 minutes'), list.length ? list.map(e =>
    $('div', { title: `${e.count} since the start`, ...color(hue(e.end)) },
      $('div', { class: 'end' }, $('code', {}, e.end), $('span', {}, e.reason), cell(e.recent)),
      $('div', { class: 'bar' }, e.recent ? $('i', { style: `width: ${e.recent / most * 100}%` }) : null)))
    : $('span', { class: 'dim' }, 'none yet'))
}
function card(route, h) {
  const graphs = [graph(rate, ['↑ from clients', 'up', h.bytes_up], ['↓ to clients', 'down', h.bytes_down]),
    graph(count, ['open', 'now', h.current]), graph(perSecond, ['new', 'good', h.connections])]
  const all = route.servers.length, up = route.servers.filter(s => s.state == 'up').length
  return $('section', { class: 'card' }, $('h2', {}, route.name,
    $('span', { class: 'pill', ...color(up == all ? 'good' : up ? 'warn' : 'bad') },
      route.in_force ? `${up} of ${all} up` : 'removed, these are its last connections'),
    facts([count(route.current), route.limit ? `of ${count(route.limit)} now` : 'now'], [count(route.max_current), 'max'],
      [count(route.connections), 'total'], [bytes(route.bytes_up), '↑'], [bytes(route.bytes_down), '↓'],
      route.queued && [count(route.queued), 'queued'], route.refused && [count(route.refused), 'refused'],
      route.connect_failures && [count(route.connect_failures), 'failed connects'])),
    $('div', { class: 'cols' }, graphs.map(svg => $('div', {}, svg.caption, svg))),
    $('div', { class: 'main' }, servers(route), ends(route)))
}
function sessions(s) {
  const many = s.routes.length > 1, orders = { bytes: 'most bytes', new: 'newest' }
  return $('section', { class: 'card' }, $('h2', {}, 'sessions', $('span', {}, Object.keys(orders).map(o =>
    $('button', { class: o == order ? 'on' : '', click: () => { order = o; poll() } }, orders[o]))),
    facts([count(s.sessions.length), `of ${count(s.current)}`])),
    table([['client'], [many ? 'route' : '', 'l wide'], ['server', 'l'], ['age'], ['↑'], ['↓']], s.sessions.map(one =>
      [one.client, many ? one.route : '', one.server, span(one.age_ms / 1000), cell(one.bytes_up, bytes),
        cell(one.bytes_down, bytes)]), 'even'))
}

// ---- life
let shown, history = {}, samples = 0, order = 'bytes', lost = 0, busy = false, pointer
function render() {
  if (!shown || !getSelection().isCollapsed) return // somebody is copying
  const s = shown, y = scrollY
  const focus = document.activeElement.tagName == 'BUTTON' && document.activeElement.textContent
  const sum = key => {
    const all = s.routes.map(r => history[r.name][key]), length = Math.max(1, ...all.map(v => v.length))
    return [...Array(length).keys()].map(i => all.reduce((n, v) => n + (v[v.length - length + i] ?? 0), 0))
  }
  document.body.className = lost ? 'old' : ''
  document.querySelector('header').replaceChildren($('h1', {}, 'tcpproxy'),
    $('span', { class: 'pill', ...color(lost || s.health != 'ok' ? 'bad' : 'good') },
      lost ? `no answer since ${new Date(lost).toLocaleTimeString()}` : s.health == 'ok' ? 'healthy' : s.health),
    facts([span(s.uptime_s), 'up'], [bytes(s.resident_bytes), 'memory'], [span(s.cpu_ms / 1000), 'processor'],
      s.log_dropped && [count(s.log_dropped), 'log lines dropped'], ['version', s.version]))
  document.querySelector('main').replaceChildren($('div', { class: 'tiles' },
    tile('connections', count, 'now', sum('current')), tile('new connections', perSecond, 'good', sum('connections')),
    tile('↑ from clients', rate, 'up', sum('bytes_up')), tile('↓ to clients', rate, 'down', sum('bytes_down'))),
    ...s.routes.map(r => card(r, history[r.name])), sessions(s))
  scrollTo(0, y)
  if (focus) [...document.querySelectorAll('button')].find(b => b.textContent == focus)?.focus()
  hover()
}
function hover() { // what a graph showed at the pointer's place
  const svg = pointer && document.elementFromPoint(...pointer)?.closest('svg')
  if (!svg?.lines) return
  const box = svg.getBoundingClientRect(), i = Math.round((pointer[0] - box.left) / box.width * (KEEP - 1))
  svg.querySelector('.mark')?.remove()
  svg.append($('-path', { class: 'mark', d: `M${i} 0V30` }))
  const said = svg.lines.map(([name, , v]) => `${name} ${i < KEEP - v.length ? '–' : svg.text(v[v.length - KEEP + i])}`)
  svg.caption.textContent = `${said.join('  ').trim()}, ${span((KEEP - 1 - i) * shown.interval_s)} ago`
}
async function poll() {
  if (busy) return
  busy = true
  try {
    const answer = await fetch(`stats.json?since=${samples}&sessions=${order}`, { signal: AbortSignal.timeout(8000) })
    const s = await answer.json(), old = shown && shown.started != s.started ? null : history
    if (old) {
      history = {}
      for (const route of s.routes) {
        const h = history[route.name] = {}
        for (const key in route.history) h[key] = [...old[route.name]?.[key] ?? [],
          ...route.history[key].map(n => key == 'current' ? n : n / s.interval_s)].slice(-KEEP)
      }
      [shown, samples, lost] = [s, s.samples, 0]
    } else [shown, history, samples] = [null, {}, 0] // it is another process now: from the beginning
  } catch {
    lost ||= Date.now()
  }
  busy = false
  render()
}
onpointermove = e => { pointer = [e.clientX, e.clientY]; hover() }
setInterval(document.onvisibilitychange = () => document.hidden || poll(), 2000)
poll()
</script></html>
"""u8;
}

// ---- control

/// <summary>Takes --control's commands as HAProxy does (its management guide, 9.3): lines of them, with ; between, each
/// answered by a text and an empty line; then the connection ends, unless it is in prompt mode. What is wrong is a
/// FormatException.</summary>
internal sealed class ControlServer(Func<string[], string> answer, Log log) : SideServer(most: 16, log)
{
    private const int LongestLine = 16 << 10; // bytes
    private const int Chunk = 64 << 10; // bytes that a client must take within Slowest
    private const int Slowest = 10_000; // ms
    private const int Idle = 60_000; // ms

    protected override async Task ServeAsync(Socket client, CancellationTokenSource time)
    {
        byte[] bytes = new byte[LongestLine];
        Conduct conduct = new();
        for (int length = 0, received = 1; received > 0 && !conduct.IsOver;)
        {
            time.CancelAfter(Idle);
            received = await client.ReceiveAsync(bytes.AsMemory(length), SocketFlags.None, time.Token);
            length += received;
            int end = received == 0 ? length : bytes.AsSpan(0, length).LastIndexOf((byte)'\n') + 1; // the last line may lack it
            if (end == 0 && length == LongestLine)
            {
                await SendAsync(client, $"{conduct.Mark}A line has less than {LongestLine} bytes.\n\n", time);
                return;
            }

            if (end > 0)
            {
                await AnswerAsync(client, Encoding.UTF8.GetString(bytes, 0, end), conduct, time);
            }

            bytes.AsSpan(end, length - end).CopyTo(bytes);
            length -= end;
        }
    }

    /// <summary>One command after the other, so that there is never more than one answer in memory.</summary>
    private async Task AnswerAsync(Socket client, string lines, Conduct conduct, CancellationTokenSource time)
    {
        foreach (string command in lines.TrimEnd('\n').Split('\n', ';'))
        {
            if (!conduct.HasQuit)
            {
                await Task.Yield(); // no event loop waits for an answer (rule 6)
                await SendAsync(client, Answer(command, conduct), time);
            }
        }

        conduct.IsOver = conduct.HasQuit || !conduct.IsPrompting;
    }

    private static async Task SendAsync(Socket client, string text, CancellationTokenSource time)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(text);
        for (int start = 0; start < bytes.Length; start += Chunk)
        {
            time.CancelAfter(Slowest);
            await client.SendAsync(bytes.AsMemory(start, Math.Min(Chunk, bytes.Length - start)), SocketFlags.None, time.Token);
        }
    }

    private string Answer(string command, Conduct conduct)
    {
        string text;
        try
        {
            string[] words = Text.Words(command);
            text = words.Length == 0 ? "" : conduct.Take(words) ?? answer(words);
            if (conduct.HasQuit || (words.Length == 0 && !conduct.IsPrompting))
            {
                return "";
            }
        }
        catch (FormatException e)
        {
            text = conduct.Mark + e.Message;
        }

        return text + (text.Length > 0 && text[^1] != '\n' ? "\n\n" : "\n") + (conduct.IsPrompting ? "> " : "");
    }

    /// <summary>What a client has said about its connection.</summary>
    private sealed class Conduct
    {
        internal bool HasQuit { get; private set; }
        internal bool IsOver { get; set; }
        internal bool IsPrompting { get; private set; }
        internal string Mark { get; private set; } = ""; // in front of an error, for programs

        /// <summary>The answer; null to any other command.</summary>
        internal string? Take(string[] words)
        {
            bool isSeverity = words is ["set", "severity-output", ..];
            HasQuit = words[0] == "quit";
            IsPrompting ^= words[0] == "prompt";
            Mark = !isSeverity ? Mark : words is not [_, _, "none" or "number" or "string"]
                ? throw new FormatException("one of 'none', 'number', 'string' is a required argument")
                : words[2] switch { "none" => "", "number" => "[3]: ", _ => "[err]: " };
            return isSeverity || words[0] is "quit" or "prompt" ? "" : null;
        }
    }
}

/// <summary>--ctl</summary>
internal static class ControlClient
{
    /// <summary>The answer without its last, empty line; and whether something in it is an error.</summary>
    /// <exception cref="IOException">there is none</exception>
    internal static (string Text, bool IsError) Ask(string path, string command, TimeSpan patience)
    {
        try
        {
            using Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            socket.ReceiveTimeout = socket.SendTimeout = (int)patience.TotalMilliseconds;
            socket.Connect(new UnixDomainSocketEndPoint(path));
            socket.Send(Encoding.UTF8.GetBytes($"set severity-output number;{command}\n"));
            using MemoryStream answer = new();
            byte[] bytes = new byte[64 << 10];
            for (int received; (received = socket.Receive(bytes)) > 0;)
            {
                answer.Write(bytes, 0, received);
            }

            return Read(Encoding.UTF8.GetString(answer.ToArray()));
        }
        catch (SocketException e)
        {
            throw new IOException($"--ctl: {path}: {(!File.Exists(path) ? "no such file or directory"
                : e.SocketErrorCode == SocketError.TimedOut ? "no answer in time" : Text.Reason(e))}");
        }
    }

    /// <summary>[0] to [3] marks an error; a few of HAProxy's have no such mark.</summary>
    private static (string Text, bool IsError) Read(string answer)
    {
        StringBuilder text = new();
        bool isError = false;
        bool isFirst = true; // of an answer
        answer = answer.StartsWith('\n') ? answer[1..] : answer; // the first is to 'set'
        foreach (string line in answer.TrimEnd('\n').Split('\n'))
        {
            bool isMarked = isFirst && line is ['[', >= '0' and <= '7', ']', ':', ' ', ..];
            string words = isMarked ? line[5..] : line;
            isError |= (isMarked && line[1] <= '3') || (isFirst && (words == "Session not found."
                || words.StartsWith("Unknown command", StringComparison.Ordinal)));
            text.Append(words).Append('\n');
            isFirst = line.Length == 0;
        }

        return (text.Length > 1 ? text.ToString() : "", isError);
    }
}

/// <summary>Who has started us and wants to know how we are: systemd, or whoever else sets NOTIFY_SOCKET (sd_notify(3)). Where
/// WATCHDOG_USEC is set as well we say that we live, twice in that time: the sweep rings in every event loop, and whichever
/// thread answers last sends the message, so that one which hangs holds it back. The log, the name look-ups and the thread pool
/// may hang without that.</summary>
internal sealed class Supervisor : Watched
{
    /// <summary>For what follows the end of the last connection.</summary>
    internal static readonly TimeSpan Spare = TimeSpan.FromSeconds(5);

    private const int StatusPause = 5000; // ms at least between two of them

    private readonly string? _path; // null = nobody wants to know
    private readonly Func<string> _status;
    private readonly byte[] _sound = new byte[1];
    private readonly List<Socket> _ropes = []; // one for each event loop
    private string _told = "";
    private long _statusDue;
    private long _ringDue;
    private int _silent; // loops that have been rung and have not answered, and the sweep that rings them

    internal Supervisor(Func<string> status)
    {
        _status = status;
        string? path = Take("NOTIFY_SOCKET");
        _path = path?.Length is > 1 and <= 107 && path[0] is '/' or '@' ? path : null; // as in sun_path of unix(7)
        bool isOurs = Take("WATCHDOG_PID") is not { } process || process == Text.Of(Environment.ProcessId);
        Bound = long.TryParse(Take("WATCHDOG_USEC"), NumberStyles.None, CultureInfo.InvariantCulture, out long time)
            && isOurs && _path is not null ? TimeSpan.FromMilliseconds(time / 2000) : TimeSpan.Zero;

        // it is meant for us, and not for our children
        static string? Take(string name)
        {
            string? value = Environment.GetEnvironmentVariable(name);
            Environment.SetEnvironmentVariable(name, null);
            return value;
        }
    }

    /// <summary>How often we say that we live; zero is never.</summary>
    internal TimeSpan Bound { get; }

    /// <summary>Before other sockets have waited for anything: the runtime gives them to its loops in turn.</summary>
    internal void Start()
    {
        for (int i = Bound > TimeSpan.Zero ? EventLoop.Count : 0; i > 0 && SocketPair.Open() is [var ear, var rope]; i--)
        {
            _ropes.Add(rope);
            _ = AnswerAsync(ear);
        }

        if (_path is not null)
        {
            Sweep.Add(this);
        }
    }

    internal void Ready() => Tell($"READY=1\nMAINPID={Text.Of(Environment.ProcessId)}\nSTATUS={_told = _status()}");

    internal void Reloading() =>
        Tell($"RELOADING=1\nMONOTONIC_USEC={Text.Of((long)Stopwatch.GetElapsedTime(0).TotalMicroseconds)}");

    /// <summary>That takes so long at most (zero: for ever), whatever the file had said when the unit was written.</summary>
    internal void Stopping(TimeSpan patience)
    {
        TimeSpan most = patience > TimeSpan.Zero ? patience + Spare : TimeSpan.FromDays(3650);
        Tell($"STOPPING=1\nSTATUS={_told = _status()}\nEXTEND_TIMEOUT_USEC={Text.Of((long)most.TotalMicroseconds)}");
    }

    internal override bool Check(long now)
    {
        if (now >= _statusDue && _told.Length > 0) // what a start is about to do is no state yet
        {
            _statusDue = now + StatusPause;
            string status = _status();
            if (status != _told)
            {
                Tell($"STATUS={_told = status}", isPatient: false);
            }
        }

        if (Bound > TimeSpan.Zero && now >= _ringDue && Volatile.Read(ref _silent) == 0)
        {
            _ringDue = now + (long)(Bound.TotalMilliseconds * 3 / 4); // the sweep may come a quarter late
            _silent = _ropes.Count + 1;
            _ropes.ForEach(rope => rope.Send(_sound));
            Answered();
        }

        return false;
    }

    private async Task AnswerAsync(Socket ear)
    {
        byte[] heard = new byte[1];
        while (await ear.ReceiveAsync(heard.AsMemory(), SocketFlags.None) > 0)
        {
            Answered();
        }
    }

    private void Answered()
    {
        if (Interlocked.Decrement(ref _silent) == 0)
        {
            Tell("WATCHDOG=1", isPatient: false);
        }
    }

    /// <summary>A patient one waits a while for a receiver who is behind: its message is not sent again.</summary>
    private void Tell(string message, bool isPatient = true)
    {
        try
        {
            if (_path is not null)
            {
                using Socket socket = new(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified);
                (socket.Blocking, socket.SendTimeout) = (isPatient, 2000);
                socket.SendTo(
                    Encoding.UTF8.GetBytes(message), new UnixDomainSocketEndPoint(_path[0] == '@' ? $"\0{_path[1..]}" : _path));
            }
        }
        catch (SocketException)
        {
            // nobody is there any more, or out of descriptors just now
        }
    }
}

// == 14  OBSERVE ====================================================================================================
// Log lines. Whoever has something to say puts it in a bounded queue and goes on; a thread of its own formats and
// writes, to stderr, a file or a socket. A reader that does not read blocks that thread and nothing else: lines beyond
// the queue are dropped, counted, and the count is said when the reader is back.

/// <summary>Why a connection ended: HAProxy's two letters (its manual, 8.5: who ended it, and in which phase) and
/// words. An orderly end closes with FIN, any other resets both sides.</summary>
internal sealed class CloseReason(
    string code, string words, bool isOrderly = false, bool isWorthRetry = false, Exception? error = null, string? kind = null)
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
    internal static readonly CloseReason ShutDown = new("KD", "shut down by control");
    internal static readonly CloseReason StoppedConnecting = new("KC", "shutdown");
    internal static readonly CloseReason StoppedReading = new("KR", "shutdown");
    internal static readonly CloseReason HeaderTimeout = new("cR", "no PROXY header in time");
    internal static readonly CloseReason HelloTimeout = new("cR", "no TLS hello in time");
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

    /// <summary>The words that it is counted under: without what clients or rules put into them.</summary>
    internal string Kind { get; } = kind ?? words;
    internal bool IsOrderly { get; } = isOrderly;

    /// <summary>The proxy would not have this client: over a limit, against a rule.</summary>
    internal bool IsRefusal => Code is "PC" or "PR" or "PQ";

    /// <summary>The failure is this server's, so another may do better.</summary>
    internal bool IsWorthRetry { get; } = isWorthRetry;

    /// <summary>What nobody expected: a defect of ours.</summary>
    internal Exception? Error { get; } = error;

    internal static CloseReason Unexpected(Exception e) => new("IC", "internal error", error: e);

    internal static CloseReason OfConnect(Exception e) => e is not SocketException error ? Unexpected(e)
        : Descriptors.AreExhausted(error.SocketErrorCode) ? OutOfDescriptors
        : error.SocketErrorCode == SocketError.TimedOut ? ConnectTimeout
        : OfServer(Text.Reason(error));

    /// <summary>What is the server's fault, in so many words.</summary>
    internal static CloseReason OfServer(string words) => new("SC", words, isWorthRetry: true);
}

internal enum LogFormat
{
    Text,
    Json,
    Haproxy,
    Syslog,
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
    private string? _socket;

    internal LogFormat Format { get; set; }
    internal string? File { get; set; } // null = stderr, or a socket
    internal LogLevel Level { get; set; }
    internal TimeSpan Long { get; set; } // zero = off
    internal bool SkipsEmpty { get; set; }

    /// <summary>The path of the socket that lines go to.</summary>
    internal string? Socket => Format == LogFormat.Off ? null
        : _socket ?? (Format == LogFormat.Syslog && File is null ? "/dev/log" : null);

    internal void SetFile(string text)
    {
        const string Unix = "unix:";
        bool isSocket = text.StartsWith(Unix, StringComparison.Ordinal);
        _socket = isSocket ? Address.CheckPath(text[Unix.Length..]) : null;
        File = isSocket ? null : Text.FileName(text);
    }
}

/// <summary>One line, or a block that goes to stderr wherever the lines go.</summary>
internal abstract class LogLine(LogLevel level)
{
    protected DateTime Time { get; private set; }

    internal LogLevel Level { get; } = level;

    /// <summary>The bytes in a block. 0 for a line.</summary>
    internal virtual int Shown => 0;

    internal virtual void Stamp() => Time = DateTime.UtcNow;

    /// <summary>Called once, by the writer.</summary>
    internal abstract void Format(LogText text);
}

/// <summary>Keys and values in turn: strings, longs, or null for what is left out.</summary>
internal sealed class EventLine(LogLevel level, string name, params object?[] keys) : LogLine(level)
{
    internal override void Format(LogText text)
    {
        text.Begin(Time, Level, name);
        for (int i = 0; i < keys.Length; i += 2)
        {
            string key = (string)keys[i]!;
            if (keys[i + 1] is long number)
            {
                text.Add(key, number);
            }
            else if (keys[i + 1] is string words)
            {
                text.Add(key, words);
            }
        }

        text.End();
    }
}

/// <summary>What USR2 asks for, where the log would not show it.</summary>
internal sealed class StateBlock(string words) : LogLine(LogLevel.Info)
{
    internal override int Shown => words.Length;

    internal override void Format(LogText text) => text.Append(words);
}

/// <summary>What an administrator wants of a server. The connections that it has go on in any case.</summary>
internal enum ServerMode
{
    Ready,
    Drain, // no new connections
    Maintenance, // and no checks
}

/// <summary>The life of one connection, filled in as it goes.</summary>
internal class ConnectionLine(RouteStats route) : LogLine(LogLevel.Info)
{
    private static int _lastId;

    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private CloseReason? _reason;

    internal RouteStats RouteStats { get; } = route;
    internal ServerStats? ServerStats { get; private set; } // null until connected

    internal uint Id { get; } = (uint)Interlocked.Increment(ref _lastId); // as control calls it
    internal EndPoint? Client { get; set; }
    internal int Place { get; set; } = -1; // of its address, where those are counted
    internal string Target { get; set; } = "-"; // the upstream as it was written
    internal long BytesUp { get; set; }
    internal long BytesDown { get; set; }

    internal EndPoint? Address { get; private set; } // of the server, once connected
    internal TimeSpan Duration { get; private set; }
    internal TimeSpan Age => Stopwatch.GetElapsedTime(_startedAt);

    /// <summary>What those leave who only look whether somebody answers.</summary>
    internal bool IsEmpty => BytesUp + BytesDown == 0 && (End == "--" || End.StartsWith('C'));

    protected long ConnectTime { get; private set; } = -1; // ms; -1 = never connected
    protected string End => _reason?.Code ?? ""; // not yet

    // ---- what HAProxy's line alone wants to know

    /// <summary>It waits for room, as the <paramref name="place"/>th.</summary>
    internal virtual void Queued(int place)
    {
    }

    internal virtual void Dequeued()
    {
    }

    /// <summary>From here on a server is looked for.</summary>
    internal virtual void Choosing()
    {
    }

    internal virtual void Tried(ServerStats server)
    {
    }

    // ----

    internal void Connected(EndPoint? address, ServerStats? server)
    {
        (Address, ServerStats) = (address, server);
        ConnectTime = (long)Age.TotalMilliseconds;
    }

    internal void Ended(CloseReason reason) => (_reason, Duration) = (reason, Age);

    /// <summary>What there is to say while it lasts.</summary>
    internal ConnectionLine Early(long bytesUp, long bytesDown)
    {
        ConnectionLine early = (ConnectionLine)MemberwiseClone();
        (early.BytesUp, early.BytesDown, early.Duration) = (bytesUp, bytesDown, Age);
        return early;
    }

    internal override void Format(LogText text)
    {
        text.Begin(Time, Level, _reason is null ? "connection-long" : "connection");
        text.Add("route", RouteStats.Title);
        text.Add("client", Text.Of(Client));
        text.Add("upstream", Target);
        text.Add("server", Text.Of(Address));
        text.Add("connect_ms", ConnectTime);
        text.Add("duration_ms", (long)Duration.TotalMilliseconds);
        text.Add("bytes_up", BytesUp);
        text.Add("bytes_down", BytesDown);
        if (_reason is not null)
        {
            text.Add("end", _reason.Code);
            text.Add("reason", _reason.Words);
        }

        text.End();
    }
}

/// <summary>The same in HAProxy's words, by its option tcplog (its manual, 8.2.2), for those who read these already:
/// %ci:%cp [%t] %ft %b/%s %Tw/%Tc/%Tt %B %ts %ac/%fc/%bc/%sc/%rc %sq/%bq. An early one has pluses, as by option
/// logasap.</summary>
internal sealed class HaproxyLine(RouteStats route, Func<int> count) : ConnectionLine(route)
{
    private readonly DateTime _acceptedAt = DateTime.UtcNow;
    private ServerStats? _server; // the last that was tried
    private int _tries;
    private int _place; // in the lines it stood in
    private long _queuedAt; // ms after the accept
    private long _waited = -1; // ms; -1 = it has come to no line
    private long _otherwise; // ms of what was before, but for that
    private string _counts = "";

    private long Now => (long)Age.TotalMilliseconds;

    internal override void Queued(int place) => (_place, _queuedAt) = (_place + place, Now);

    internal override void Dequeued() => _waited = Math.Max(_waited, 0) + Now - _queuedAt;

    internal override void Choosing()
    {
        _waited = Math.Max(_waited, 0);
        _otherwise = Now - _waited;
    }

    internal override void Tried(ServerStats server) => (_server, _tries) = (server, _tries + 1);

    /// <summary>As HAProxy, one that ends counts itself in the process and the frontend, but not behind it any more. Another try
    /// is one at another server, which is the plus.</summary>
    internal override void Stamp()
    {
        base.Stamp();
        _server = ServerStats ?? _server;
        int others = Volatile.Read(ref RouteStats.Current);
        int ofServer = _server is null ? 0 : Volatile.Read(ref _server.Active);
        _counts = $"{count()}/{others + (End.Length > 0 ? 1 : 0)}/{others}/{ofServer}/{(_tries > 1 ? "+" : "")}"
            + $"{Math.Max(_tries - 1, 0)} 0/{_place}";
    }

    internal override void Format(LogText text)
    {
        string plus = End.Length > 0 ? "" : "+";
        long connecting = ConnectTime < 0 ? -1 : ConnectTime - _otherwise - _waited;
        text.Append(Client is IPEndPoint ? string.Concat(Text.Of(Client).Split('[', ']')) : "unix:1"); // a path is one listener
        text.Append(_acceptedAt.ToLocalTime().ToString(" [dd/MMM/yyyy:HH:mm:ss.fff] ", CultureInfo.InvariantCulture));
        text.AppendName(RouteStats.Title);
        text.Append(" ");
        text.AppendName(RouteStats.Title);
        text.Append("/");
        text.AppendName(_server?.Title ?? "<NOSRV>");
        text.Append($" {_waited}/{connecting}/{plus}{(long)Duration.TotalMilliseconds} {plus}{BytesDown} ");
        text.Append($"{(plus.Length > 0 ? "--" : End)} {_counts}\n");
    }
}

/// <summary>Lines as bytes: logfmt, alone or in messages of RFC 5424, or JSON with the same keys.</summary>
internal sealed class LogText(LogFormat format, bool isJournal = false)
{
    private const int Daemon = 3; // the facility
    private static readonly string Sender = $"{HostName(Environment.MachineName)} tcpproxy {Environment.ProcessId}";

    private readonly bool _isJson = format == LogFormat.Json;
    private byte[] _bytes = new byte[1024];
    private int _length;
    private bool _isFirst;

    internal ReadOnlySpan<byte> Bytes => _bytes.AsSpan(0, _length);

    internal void Clear() => _length = 0;

    internal void Begin()
    {
        _isFirst = true;
        Append(_isJson ? "{" : "");
    }

    /// <summary>A line, with what all of them have.</summary>
    internal void Begin(DateTime time, LogLevel level, string name)
    {
        (string word, int severity) = level switch
        {
            LogLevel.Debug => ("debug", 7),
            LogLevel.Info => ("info", 6),
            LogLevel.Warn => ("warn", 4),
            _ => ("error", 3),
        };
        Append(format == LogFormat.Syslog ? $"<{(8 * Daemon) + severity}>1 {Text.Of(time)} {Sender} {name} - "
            : isJournal ? $"<{severity}>" : "");
        Begin();
        if (_isJson || (format != LogFormat.Syslog && !isJournal)) // the others' readers are told once
        {
            Add("time", Text.Of(time));
            Add("level", word);
        }

        Add("event", name);
    }

    internal void End() => Append(_isJson ? "}\n" : "\n");

    internal void Add(string key, string value)
    {
        Key(key);
        bool isPlain = !_isJson && value.Length > 0 && value.AsSpan().IndexOfAnyExceptInRange('!', '~') < 0
            && value.AsSpan().IndexOfAny('"', '=', '\\') < 0;
        Append(isPlain ? value : $"\"{Text.Escape(value)}\"");
    }

    internal void Add(string? key, long value)
    {
        Key(key);
        Append(value.ToString(CultureInfo.InvariantCulture));
    }

    internal void Add(string key, bool value)
    {
        Key(key);
        Append(value ? "true" : "false");
    }

    // ---- what is nested, in JSON

    internal void Add(long value) => Add(null, value);

    internal void Open(string bracket, string? key = null)
    {
        Key(key);
        Append(bracket);
        _isFirst = true;
    }

    internal void Close(string bracket)
    {
        Append(bracket);
        _isFirst = false;
    }

    private void Key(string? key) // null in an array
    {
        Append(_isFirst ? "" : _isJson ? "," : " ");
        _isFirst = false;
        if (key is not null)
        {
            Append(_isJson ? "\"" : "");
            Append(key);
            Append(_isJson ? "\":" : "=");
        }
    }

    /// <summary>A word of HAProxy's line, which has no quotes: what would part it is #XX.</summary>
    internal void AppendName(string name)
    {
        foreach (byte b in Encoding.UTF8.GetBytes(name))
        {
            Append(b is > (byte)' ' and < 127 and not ((byte)'/' or (byte)'#') ? $"{(char)b}" : $"#{b:X2}");
        }
    }

    private static string HostName(string name) =>
        name.Length is > 0 and < 256 && name.AsSpan().IndexOfAnyExceptInRange('!', '~') < 0 ? name : "-";

    internal void Append(ReadOnlySpan<byte> text)
    {
        text.CopyTo(Room(text.Length));
        Grow(text.Length);
    }

    internal void Append(string text) => Grow(Encoding.UTF8.GetBytes(text, Room(Encoding.UTF8.GetMaxByteCount(text.Length))));

    /// <summary>At least so many bytes behind the text; what is put there belongs to it after <see cref="Grow"/>.</summary>
    internal Span<byte> Room(int most)
    {
        if (_length + most > _bytes.Length)
        {
            Array.Resize(ref _bytes, Math.Max(2 * _bytes.Length, _length + most));
        }

        return _bytes.AsSpan(_length);
    }

    internal void Grow(int length) => _length += length;
}

internal sealed class Log : IDisposable
{
    private const int QueueLength = 8192; // lines; about two megabytes when full
    private const int ShownLength = 4 << 20; // bytes of blocks
    private const int Gather = 10; // ms: the writer wakes once for what comes within this time
    private const int Chunk = 32 << 10; // bytes written at once

    private readonly LogSettings _settings;
    private readonly Queue<LogLine> _queue = []; // under itself, as all below it
    private bool _isWaiting; // the writer, for a first line
    private bool _isStopping;
    private bool _isReopening;
    private long _dropped;
    private int _shown; // of ShownLength
    private long _missed; // bytes
    private FileStream? _file; // owned; the writer's, as the next three; null = stderr, or a socket
    private Socket? _socket; // owned; null = not connected
    private long _retryAt; // TickCount64
    private long _lost; // lines, since nobody has listened, or nothing could be written; the writer's, as the next
    private bool _isTorn; // a part of the first of them is there
    private Thread? _writer;

    internal Log(LogSettings settings) => _settings = settings;

    internal long DroppedInAll { get; private set; } // lines that nobody will ever read

    public void Dispose() => Stop(0);

    /// <exception cref="IOException">the file cannot be opened</exception>
    internal void Start()
    {
        Open();
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
        Write(new EventLine(level, name, "route", route, "message", message.Length > 0 ? message : null));

    internal void Count(LogLevel level, string name, string key, long count) => Write(new EventLine(level, name, key, count));

    internal void Listening(string route, string listen, string upstream) =>
        Write(new EventLine(LogLevel.Info, "listening", "route", route, "listen", listen, "upstream", upstream));

    internal void ServerState(string route, string server, bool isUp, string reason) =>
        ServerState(isUp ? LogLevel.Info : LogLevel.Warn, route, server, isUp ? "up" : "down", reason);

    internal void ServerState(string route, string server, ServerMode mode) => ServerState(LogLevel.Info, route, server,
        mode switch { ServerMode.Ready => "ready", ServerMode.Drain => "drain", _ => "maint" }, "control");

    private void ServerState(LogLevel level, string route, string server, string state, string reason) =>
        Write(new EventLine(level, "server", "route", route, "server", server, "state", state, "reason", reason));

    internal void Ended(ConnectionLine line)
    {
        if (!_settings.SkipsEmpty || !line.IsEmpty)
        {
            Write(line);
        }
    }

    internal void State(string words, string? route = null) => Write(Has(LogLevel.Info)
        ? new EventLine(LogLevel.Info, "state", "route", route, "message", words)
        : new StateBlock(Text.Escape($"tcpproxy: {(route is null ? "" : $"route {route}: ")}{words}") + "\n"));

    /// <summary>Whether a connection is to be told early: another --log-long has passed since the sweep's last look.</summary>
    internal bool IsDue(long now, long startedAt)
    {
        const int ClockStep = 10; // ms at most of the coarse clock behind TickCount64: nobody is told too early
        long period = (long)_settings.Long.TotalMilliseconds;
        startedAt += ClockStep;
        long age = now - startedAt;
        return period > 0 && age >= period && age / period > (Sweep.LastLook - startedAt) / period;
    }

    /// <summary>The file has been renamed, or the socket is another.</summary>
    internal void Reopen()
    {
        lock (_queue)
        {
            (_isReopening, _isWaiting) = (true, false);
            Monitor.Pulse(_queue);
        }
    }

    internal bool Has(LogLevel level) =>
        level >= _settings.Level && _settings.Format != LogFormat.Off && _writer is not null;

    /// <summary>False when it never will be.</summary>
    internal bool Write(LogLine line)
    {
        if (line.Shown == 0 && !Has(line.Level))
        {
            return false;
        }

        line.Stamp();
        lock (_queue)
        {
            if (_queue.Count == QueueLength || _shown + line.Shown > ShownLength)
            {
                _dropped += line.Shown > 0 ? 0 : 1;
                DroppedInAll += line.Shown > 0 ? 0 : 1;
                _missed += line.Shown;
                return false;
            }

            _shown += line.Shown;
            _queue.Enqueue(line);
            if (_isWaiting)
            {
                _isWaiting = false;
                Monitor.Pulse(_queue);
            }

            return true;
        }
    }

    // ---- the writer

    private void WriteAll()
    {
        LogText text = NewText();
        List<LogLine> lines = [];
        while (Take(lines))
        {
            bool isShown = false;
            foreach (LogLine line in lines)
            {
                if (text.Bytes.Length >= Chunk || isShown != line.Shown > 0 || _settings.Socket is not null)
                {
                    WriteOut(text, isShown);
                    isShown = line.Shown > 0;
                }

                line.Format(text);
            }

            WriteOut(text, isShown);
            lines.Clear();
        }

        _file?.Dispose();
        _socket?.Dispose();
    }

    /// <summary>Waits for lines and takes them; false when there are none and none will come.</summary>
    private bool Take(List<LogLine> lines)
    {
        lock (_queue)
        {
            while (_queue.Count == 0 && !_isStopping && !_isReopening)
            {
                _isWaiting = true;
                Monitor.Wait(_queue);
            }

            if (!_isStopping && !_isReopening)
            {
                Monitor.Wait(_queue, Gather); // nobody pulses now but Stop
            }

            lines.AddRange(_queue);
            _queue.Clear();
            if (_dropped + _missed > 0)
            {
                string blocks = _missed == 0 ? "" : $" and {Text.Count(_missed, "byte")} of --dump";
                string missed = $"{Text.Count(_dropped, "line")}{blocks}";
                lines.Add(Own(LogLevel.Warn, $"{missed} dropped: the reader of the log is too slow"));
                (_dropped, _missed) = (0, 0);
            }

            _shown = 0;
            if (!_isReopening)
            {
                return lines.Count > 0;
            }

            _isReopening = false;
        }

        try
        {
            Open();
        }
        catch (IOException e)
        {
            lines.Add(Own(LogLevel.Error, $"{e.Message}; the old one is still written to"));
        }

        return true;
    }

    private LogText NewText() => new(_settings.Format, _settings is { File: null, Socket: null } && StandardStream.IsJournal);

    private static EventLine Own(LogLevel level, string message)
    {
        EventLine line = new(level, "log", "message", message);
        line.Stamp();
        return line;
    }

    /// <exception cref="IOException">the file cannot be opened; the one before stays</exception>
    private void Open()
    {
        FileStream? before = _file;
        _file = _settings.File is { } file && _settings.Format != LogFormat.Off ? AppendTo(file) : null;
        before?.Dispose();
        _socket?.Dispose();
        (_socket, _retryAt, _isTorn) = (null, 0, false);
    }

    private static FileStream AppendTo(string file)
    {
        try
        {
            // not FileMode.Append, to which a file that is truncated meanwhile is an error
            FileStream opened = new(file, FileMode.OpenOrCreate, FileAccess.Write, FileShare.ReadWrite | FileShare.Delete, 0);
            _ = Libc.IsThere ? Libc.Fcntl((int)opened.SafeFileHandle.DangerousGetHandle(), Libc.SetStatusFlags, Libc.Append) : 0;
            return opened;
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            throw new IOException($"--log-file: cannot open {file}: {Text.Reason(e)}");
        }
    }

    private void WriteOut(LogText text, bool isShown)
    {
        if (text.Bytes.IsEmpty)
        {
            return;
        }

        if (isShown)
        {
            StandardStream.TryWrite(StandardStream.Error, text.Bytes);
        }
        else if (_settings.Socket is { } path)
        {
            Send(path, text.Bytes);
        }
        else
        {
            Append(text.Bytes);
        }

        text.Clear();
    }

    /// <summary>While the disk is full lines are lost, and traffic goes on without a log.</summary>
    private void Append(ReadOnlySpan<byte> bytes)
    {
        if (_lost > 0)
        {
            ReadOnlySpan<byte> words = Lost("the log could not be written");
            int said = TryAppend(words);
            (_lost, _isTorn) = said == words.Length ? (0, false) : (_lost, _isTorn || said > 0);
        }

        int written = _lost > 0 ? 0 : TryAppend(bytes);
        if (written < bytes.Length)
        {
            _isTorn |= _file is null || (written > 0 && bytes[written - 1] != '\n'); // of stderr nobody knows
            Lose(bytes[written..].Count((byte)'\n'));
        }
    }

    /// <summary>To the file, or stderr; returns how many bytes were written, as far as that is known.</summary>
    private int TryAppend(ReadOnlySpan<byte> bytes)
    {
        if (_file is null)
        {
            return StandardStream.TryWrite(StandardStream.Error, bytes) ? bytes.Length : 0;
        }

        long start = Length();
        try
        {
            if (_file.CanSeek)
            {
                _file.Seek(0, SeekOrigin.End); // where Libc is not there to have the system append
            }

            _file.Write(bytes);
            return bytes.Length;
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            return (int)Math.Clamp(Length() - start, 0, bytes.Length);
        }

        long Length()
        {
            try
            {
                return _file.CanSeek ? _file.Length : 0;
            }
            catch (Exception e) when (Text.IsOfFile(e))
            {
                return 0;
            }
        }
    }

    /// <summary>One line. While nobody listens lines are lost, and each second it is tried again.</summary>
    private void Send(string path, ReadOnlySpan<byte> line)
    {
        const int Pause = 1000; // ms
        for (bool isOld = _socket is not null; isOld || Environment.TickCount64 >= _retryAt; isOld = false)
        {
            try
            {
                _socket = isOld ? _socket : UnixSocket.Connect(path);
                if (_lost > 0)
                {
                    UnixSocket.Send(_socket!, Lost($"nobody listened at {path}"));
                    _lost = 0;
                }

                UnixSocket.Send(_socket!, line);
                return;
            }
            catch (SocketException) when (isOld)
            {
                _socket!.Dispose(); // who listened there may have been started anew
            }
            catch (SocketException e)
            {
                _socket?.Dispose();
                (_socket, _retryAt) = (null, Environment.TickCount64 + Pause);
                StandardStream.TryWrite(StandardStream.Error, _lost > 0 ? []
                    : Encoding.UTF8.GetBytes(Text.Escape($"tcpproxy: lines of the log are lost: cannot send them to {path}: "
                        + (File.Exists(path) ? Text.Reason(e) : "no such file or directory")) + "\n"));
            }
        }

        Lose(1);
    }

    private void Lose(int lines)
    {
        _lost += lines;
        lock (_queue)
        {
            DroppedInAll += lines;
        }
    }

    /// <summary>Tells of them.</summary>
    private ReadOnlySpan<byte> Lost(string why)
    {
        LogText words = NewText();
        words.Append(_isTorn ? "\n" : "");
        Own(LogLevel.Warn, $"{Text.Count(_lost, "line")} dropped: {why}").Format(words);
        return words.Bytes;
    }
}

// ---- counters

/// <summary>The proxy, to those who look at it from outside.</summary>
internal interface IObserved
{
    public string Version { get; }
    public DateTime StartedAt { get; }
    public bool IsDraining { get; }

    /// <summary>The counters of all routes, in their order, with what is so at the moment.</summary>
    public List<RouteStats> Look();
}

/// <summary>A connection that is being relayed, to the same.</summary>
internal interface ISession
{
    public ConnectionLine Line { get; }
    public long BytesUp { get; }
    public long BytesDown { get; }
}

/// <summary>What is counted of a route, or of a server. Interlocked writes it when a connection comes, is connected and ends,
/// never for a message: how much those that run have moved, they are asked (<see cref="Totals"/>).</summary>
internal abstract class Counters(string title)
{
    internal long Connections;
    internal int Current;
    internal int Most; // at once, ever
    internal long ConnectFailures;
    internal long Retries;
    internal long ClientResets;
    internal long ServerResets;
    private long _endedUp; // bytes of connections that have ended, as below
    private long _endedDown;
    private long _up; // the same and those that run, while they are summed, as below
    private long _down;

    /// <summary>As of the last <see cref="Totals"/>. It never falls, though who ends is for a moment in neither sum.</summary>
    internal long BytesUp { get; private set; }
    internal long BytesDown { get; private set; }

    internal string Title { get; set; } = title;

    /// <summary>The title, with a number where it is not the only one.</summary>
    internal string Name { get; set; } = "";
    internal int MaxConnections { get; set; } // 0 = off

    internal void Begin() => (_up, _down) = (Volatile.Read(ref _endedUp), Volatile.Read(ref _endedDown));

    internal void Add(long up, long down) => (_up, _down) = (_up + up, _down + down);

    internal void Finish() => (BytesUp, BytesDown) = (Math.Max(BytesUp, _up), Math.Max(BytesDown, _down));

    /// <summary>So many at once.</summary>
    protected void Peak(int current)
    {
        for (int most = Volatile.Read(ref Most); current > most;)
        {
            most = Interlocked.CompareExchange(ref Most, current, most);
        }
    }

    internal void Count(ConnectionLine line, CloseReason reason)
    {
        Interlocked.Add(ref _endedUp, line.BytesUp);
        Interlocked.Add(ref _endedDown, line.BytesDown);
        if (reason.Code is "CD" or "SD")
        {
            Interlocked.Increment(ref reason.Code == "CD" ? ref ClientResets : ref ServerResets);
        }
    }
}

internal sealed class RouteStats(string title) : Counters(title)
{
    private const int MostEnds = 64; // the words of the operating system are not ours to number

    internal static readonly string[] HistoryKeys = ["current", "connections", "bytes_up", "bytes_down"];

    private readonly Lock _gate = new();
    private Series[]? _history;
    private EndCount[] _ends = [new("--", "other")]; // the first for those beyond; replaced as a whole, under the gate

    internal long Refused;

    internal Histogram ConnectTime { get; } = new(Histogram.Connects);
    internal Histogram Duration { get; } = new(Histogram.Lives); // of those that were connected
    internal EndCount[] Ends => Volatile.Read(ref _ends);
    internal Series[] History => _history ??= Array.ConvertAll(HistoryKeys, _ => new Series()); // once there is a --stats

    // as of the last look
    internal List<ServerStats> Servers { get; set; } = [];
    internal int Queued { get; set; }
    internal bool IsInForce { get; set; } // or gone after a reload, but for the connections that it still has

    internal void Accepted() => Interlocked.Increment(ref Connections);

    /// <summary>It has its place among the connections.</summary>
    internal void Entered() => Peak(Interlocked.Increment(ref Current));

    internal void Ended(ConnectionLine line, CloseReason reason, bool hasEntered)
    {
        Count(line, reason);
        Interlocked.Increment(ref (Find(reason) ?? Add(reason)).Count);
        Interlocked.Add(ref Current, hasEntered ? -1 : 0);
        Interlocked.Add(ref Refused, reason.IsRefusal ? 1 : 0);
        if (line.ServerStats is { } server)
        {
            server.Count(line, reason);
            Duration.Add(line.Duration);
        }
    }

    /// <summary>Called every <see cref="Series.Interval"/>, by one thread.</summary>
    internal void Sample(long sample)
    {
        History[0].Found(sample, Volatile.Read(ref Current));
        History[1].Grown(sample, Volatile.Read(ref Connections));
        History[2].Grown(sample, BytesUp);
        History[3].Grown(sample, BytesDown);
        foreach (EndCount end in Ends)
        {
            (end.Recent ??= new Series()).Grown(sample, Volatile.Read(ref end.Count));
        }
    }

    private EndCount? Find(CloseReason reason)
    {
        foreach (EndCount end in Ends)
        {
            if (end.Code == reason.Code && end.Words == reason.Kind)
            {
                return end;
            }
        }

        return null;
    }

    private EndCount Add(CloseReason reason)
    {
        lock (_gate)
        {
            EndCount end = Find(reason) ?? (_ends.Length == MostEnds ? _ends[0] : new EndCount(reason.Code, reason.Kind));
            Volatile.Write(ref _ends, Array.IndexOf(_ends, end) >= 0 ? _ends : [.. _ends, end]);
            return end;
        }
    }
}

/// <summary>How many connections have ended so: <see cref="CloseReason.Code"/> and <see cref="CloseReason.Kind"/>.</summary>
internal sealed class EndCount(string code, string words)
{
    internal long Count;

    internal string Code { get; } = code;
    internal string Words { get; } = words;
    internal Series? Recent { get; set; }
}

internal sealed class ServerStats(RouteStats route) : Counters(title: "") // until it is known
{
    internal int Active; // connections, at any moment; changed by Interlocked
    internal int Downs; // how often it went down
    internal long ConnectMicroseconds; // of all Connections together

    internal RouteStats RouteStats { get; set; } = route; // a reload may rename it
    internal DateTime Since { get; private set; } = DateTime.UtcNow; // it is up, or down
    internal string Check { get; set; } = ""; // what the last one found; "" = none yet
    internal string LastFailure { get; set; } = ""; // of a connect
    internal DateTime LastFailedAt { get; private set; }

    // as of the last look
    internal string Address { get; set; } = "";
    internal int Weight { get; set; }
    internal bool IsBackup { get; set; }
    internal bool IsChecked { get; set; }
    internal int Percent { get; set; } = 100; // of its share, in a slow start
    internal string State { get; set; } = "up"; // or down, drain, maint

    internal void Connected(TimeSpan time, int current)
    {
        Interlocked.Increment(ref Connections);
        Interlocked.Add(ref ConnectMicroseconds, (long)time.TotalMicroseconds);
        Peak(current);
        RouteStats.ConnectTime.Add(time);
    }

    internal void Failed(CloseReason reason)
    {
        Interlocked.Increment(ref ConnectFailures);
        Interlocked.Increment(ref RouteStats.ConnectFailures);
        (LastFailure, LastFailedAt) = (reason.Words, DateTime.UtcNow);
    }

    /// <summary>Another is tried instead.</summary>
    internal void Retried()
    {
        Interlocked.Increment(ref Retries);
        Interlocked.Increment(ref RouteStats.Retries);
    }

    internal void Turned(bool isDown)
    {
        Since = DateTime.UtcNow;
        Interlocked.Add(ref Downs, isDown ? 1 : 0);
    }
}

/// <summary>Times in buckets, as Prometheus has them.</summary>
internal sealed class Histogram(long[] bounds)
{
    internal static readonly long[] Connects = // microseconds, as below
        [500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000];
    internal static readonly long[] Lives = [10_000, 100_000, 500_000, 1_000_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000,
        300_000_000, 900_000_000, 3_600_000_000, 14_400_000_000, 86_400_000_000];

    private readonly long[] _counts = new long[bounds.Length + 1]; // the last for what is longer than all
    private long _sum;

    internal long[] Bounds { get; } = bounds;
    internal long Sum => Volatile.Read(ref _sum);

    internal long CountAt(int bucket) => Volatile.Read(ref _counts[bucket]);

    internal void Add(TimeSpan time)
    {
        long microseconds = (long)time.TotalMicroseconds;
        int bucket = 0;
        while (bucket < Bounds.Length && microseconds > Bounds[bucket])
        {
            bucket++;
        }

        Interlocked.Increment(ref _counts[bucket]);
        Interlocked.Add(ref _sum, microseconds);
    }
}

/// <summary>All counters at one moment, with what the running connections have moved. It takes about a millisecond for 10,000
/// of them, so it is not for the threads of the event loop.</summary>
internal sealed class Totals
{
    private static readonly Lock Gate = new();
    private static Watched[] _seen = []; // under the gate

    /// <summary>Up to <paramref name="most"/> connections are wanted too: the youngest or those with the most bytes.</summary>
    internal Totals(IObserved proxy, int most = 0, bool areYoungest = false)
    {
        lock (Gate)
        {
            Routes = proxy.Look();
            Dictionary<string, string> names = [];
            foreach (RouteStats route in Routes)
            {
                route.Name = Unique(names, route.Title);
                Dictionary<string, string> known = [];
                route.Servers.ForEach(server => server.Name = Unique(known, server.Title));
            }

            ForEach(counters => counters.Begin());
            int count = Sweep.Copy(ref _seen); // after the sums: who ends between counts the next time, not twice
            Span<Watched> watched = _seen.AsSpan(0, count);
            foreach (Watched one in watched)
            {
                if (one is ISession session)
                {
                    Running++;
                    (long up, long down) = (session.BytesUp, session.BytesDown);
                    session.Line.RouteStats.Add(up, down);
                    session.Line.ServerStats?.Add(up, down);
                    Put(session, most, areYoungest);
                }
            }

            watched.Clear();
            ForEach(counters => counters.Finish());
        }
    }

    internal List<RouteStats> Routes { get; }
    internal int Running { get; private set; }
    internal List<ISession> Sessions { get; } = []; // in their order

    private void Put(ISession session, int most, bool areYoungest)
    {
        int place = Sessions.Count;
        while (place > 0 && IsBefore(session, Sessions[place - 1]))
        {
            place--;
        }

        if (place < most)
        {
            Sessions.Insert(place, session);
            Sessions.RemoveRange(Math.Min(most, Sessions.Count), Sessions.Count > most ? 1 : 0);
        }

        bool IsBefore(ISession a, ISession b) =>
            areYoungest ? (int)(a.Line.Id - b.Line.Id) > 0 : a.BytesUp + a.BytesDown > b.BytesUp + b.BytesDown;
    }

    private static string Unique(Dictionary<string, string> names, string title)
    {
        string name = title;
        for (int i = 2; !names.TryAdd(name, title); i++)
        {
            name = $"{title}#{Text.Of(i)}";
        }

        return name;
    }

    private void ForEach(Action<Counters> action) => Routes.ForEach(route =>
    {
        action(route);
        route.Servers.ForEach(action);
    });
}

/// <summary>What each interval has added to a number that only grows, or found of one that does not: for five minutes.</summary>
internal sealed class Series
{
    internal const int Length = 150;
    internal const int Interval = 2; // seconds

    private readonly long[] _values = new long[Length];
    private long _last;

    internal long this[long sample] => _values[sample % Length];

    internal void Grown(long sample, long total) => (_values[sample % Length], _last) = (total - _last, total);

    internal void Found(long sample, long value) => _values[sample % Length] = value;

    internal long Sum()
    {
        long sum = 0;
        Array.ForEach(_values, value => sum += value);
        return sum;
    }
}

// == 15  PLATFORM ===================================================================================================
// What stands on the operating system and the runtime, and the words that people type: the sweep, the event loop's
// settings, descriptors, socket options, libc; addresses, units, text. A libc call is never needed: where it is
// missing, the portable path serves.

/// <summary>Something with timeouts.</summary>
internal abstract class Watched
{
    internal int Place { get; set; } = -1; // in the sweep's list; -1 = not there

    /// <summary>When what begins now has taken <paramref name="time"/> (TickCount64); never for zero.</summary>
    internal static long Deadline(TimeSpan time) =>
        time > TimeSpan.Zero ? Environment.TickCount64 + (long)time.TotalMilliseconds : long.MaxValue;

    /// <summary>Called now and then by the sweep's thread, possibly once more after it was removed. False when nothing
    /// has happened since the last time.</summary>
    internal abstract bool Check(long now);

    /// <summary>Called instead once the process is to end.</summary>
    internal virtual void Stop()
    {
    }
}

/// <summary>One thread looks at everything that has a timeout, again and again, instead of a timer for each. It looks
/// as often as an eighth of the shortest timeout, half as often while all is quiet, and not at all while there is nothing
/// to look at. Where the whole process has stood still (SIGSTOP, a virtual machine that was moved), the event loops have
/// a pause's time to take what has come meanwhile, before anybody is late.</summary>
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

    /// <summary>When it looked before (TickCount64), for those at whom it looks.</summary>
    internal static long LastLook { get; private set; }

    /// <summary>From now on at the pace of these.</summary>
    internal static void Start(IEnumerable<TimeSpan> bounds)
    {
        double least = Longest * 8;
        foreach (TimeSpan bound in bounds)
        {
            least = bound > TimeSpan.Zero ? Math.Min(least, bound.TotalMilliseconds) : least;
        }

        bool isFirst = Interlocked.Exchange(ref _interval, Math.Max(Shortest, (int)least / 8)) == 0;
        if (isFirst)
        {
            new Thread(Run, 128 << 10) { IsBackground = true, Name = "sweep" }.Start();
        }

        Bell.Set(); // a reload leaves garbage, which is looked after even where nothing is watched
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

    /// <summary>Puts what is watched now into <paramref name="seen"/>, which grows as it must; returns how many.</summary>
    internal static int Copy(ref Watched[] seen)
    {
        lock (Gate)
        {
            seen = seen.Length < _count ? new Watched[_watched.Length] : seen;
            Array.Copy(_watched, seen, _count);
            return _count;
        }
    }

    private static void Run()
    {
        Watched[] seen = [];
        Rest rest = new();
        bool isQuiet = false;
        long woke = Environment.TickCount64;
        while (true)
        {
            int pause = IsEmpty() ? rest.IsDue ? Rest.Quiet : Timeout.Infinite
                : isQuiet ? Math.Min(2 * _interval, Longest) : _interval;
            Bell.WaitOne(pause);
            long now = Environment.TickCount64;
            bool isStop = now >= Volatile.Read(ref _stopAllAt);
            bool hasStalled = pause > 0 && now - woke > 2 * pause;
            woke = hasStalled ? long.MaxValue : now; // but never twice in a row: who is always late must look as well
            isQuiet = !hasStalled;
            if (hasStalled && !isStop)
            {
                continue;
            }

            int count = Copy(ref seen);
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

            LastLook = now;
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
/// each then takes 2.9 KB instead of 3.4 to 5.</summary>
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

internal static class Signals
{
    /// <summary>Under nohup HUP comes ignored, which the runtime respects: it would not reload. A file that may not grow is
    /// an error of a write, not the end.</summary>
    internal static void Prepare()
    {
        if (Libc.IsThere)
        {
            _ = Libc.Signal(Libc.SigHangUp, Libc.DefaultAction);
            _ = Libc.Signal(Libc.SigFileSize, Libc.Ignore);
        }
    }

    /// <summary>USR1 and USR2, where there are any.</summary>
    internal static PosixSignalRegistration? OfUser(int number, Action heed)
    {
        (int first, int step) = OperatingSystem.IsLinux() ? (10, 2) : (30, 1); // macOS and the BSDs
        return OperatingSystem.IsWindows() ? null
            : PosixSignalRegistration.Create((PosixSignal)(first + ((number - 1) * step)), context =>
            {
                context.Cancel = true; // the runtime would end the process
                heed();
            });
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

    /// <summary>How many there are, as the runtime reckons.</summary>
    internal static int Count => int.TryParse(Environment.GetEnvironmentVariable("DOTNET_SYSTEM_NET_SOCKETS_THREAD_COUNT"),
        NumberStyles.None, CultureInfo.InvariantCulture, out int count) && count > 0 ? count : Environment.ProcessorCount;

    /// <summary>To be awaited by one who has worked for long: goes on after what has come for others.</summary>
    internal static ValueTask<int> TurnAsync() => TurnAsync(Bell.OfLoop());

    /// <summary>Goes on in the loop of that bell, or anywhere if there is none.</summary>
    internal static ValueTask<int> TurnAsync(Bell? bell) => bell is not null ? new ValueTask<int>(bell, 0) : YieldAsync();

    private static async ValueTask<int> YieldAsync()
    {
        await Task.Yield();
        return 0;
    }
}

/// <summary>A socket pair in which an event loop rings itself, so that those who await their turn go on by themselves when the
/// loop has looked at all other sockets. Task.Yield would move them to the thread pool, which competes with the loop for its
/// processor: a fifth more of its time per byte copied.</summary>
internal sealed class Bell(Socket ear, Socket rope) : IValueTaskSource<int> // owned, both
{
    [ThreadStatic]
    private static Bell? _ofLoop;

    private static int _isHanging; // one of them, to the loop that will be its own

    private readonly byte[] _sound = new byte[1];
    private readonly ConcurrentQueue<(Action<object?> Go, object? State)> _waiting = new();
    private bool _isRung;

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
        if (SocketPair.Open() is [var ear, var rope])
        {
            Bell bell = new(ear, rope);
            _ = bell.RunAsync();
            rope.Send(bell._sound); // now that it waits: it goes on in its loop
        }
        else
        {
            _isHanging = 0; // out of descriptors just now
        }
    }

    private async Task RunAsync()
    {
        await ear.ReceiveAsync(_sound.AsMemory(), SocketFlags.None);
        _isHanging = 0;
        if (_ofLoop is not null || Thread.CurrentThread.IsThreadPoolThread)
        {
            ear.Dispose();
            rope.Dispose();
            return;
        }

        _ofLoop = this;
        while (true)
        {
            Interlocked.Exchange(ref _isRung, false);
            ValueTask<int> ringing = ear.ReceiveAsync(_sound.AsMemory(), SocketFlags.None); // before they ring: so it waits
            for (int count = _waiting.Count; count > 0 && _waiting.TryDequeue(out var one); count--)
            {
                one.Go(one.State);
            }

            await ringing;
        }
    }

    public int GetResult(short token) => 0;

    public ValueTaskSourceStatus GetStatus(short token) => ValueTaskSourceStatus.Pending;

    public void OnCompleted(Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags)
    {
        _waiting.Enqueue((continuation, state));
        if (!Interlocked.Exchange(ref _isRung, true))
        {
            rope.Send(_sound);
        }
    }
}

internal static class SocketPair
{
    /// <summary>Two; null when out of descriptors, and without libc.</summary>
    internal static Socket[]? Open()
    {
        Span<int> ends = stackalloc int[2];
        return Libc.IsThere && Libc.OpenSocketPair(Libc.UnixFamily, Libc.StreamSocket | Libc.CloseOnExecSocket, 0,
            ref MemoryMarshal.GetReference(ends)) == 0 ? [Own(ends[0]), Own(ends[1])] : null;
    }

    internal static Socket Own(int descriptor) => new(new SafeSocketHandle(descriptor, ownsHandle: true));
}

/// <summary>stdout and stderr. A native executable calls write(2): System.Console would bring the terminal database
/// and the encodings along (0.2 MB), send a terminal its own codes, and let a stdout that nobody reads hold up stderr.</summary>
internal static class StandardStream
{
    internal const int Output = 1;
    internal const int Error = 2;

    private static readonly Stream?[] Files = new Stream?[Error + 1]; // never closed

    /// <summary>stderr is systemd's journal (systemd.exec(5)): it knows the time, and takes a priority in front of a
    /// line.</summary>
    internal static bool IsJournal => Environment.GetEnvironmentVariable("JOURNAL_STREAM")?.Split(':') is [_, { } inode]
        && new FileInfo("/proc/self/fd/2").LinkTarget == $"socket:[{inode}]";

    /// <summary>False when nobody reads it, or its disk is full.</summary>
    internal static bool TryWrite(int stream, ReadOnlySpan<byte> bytes)
    {
        if (!OperatingSystem.IsLinux() || RuntimeFeature.IsDynamicCodeSupported)
        {
            return TryWriteFile(stream, bytes);
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

    private static bool TryWriteFile(int stream, ReadOnlySpan<byte> bytes)
    {
        try
        {
            Stream file = Files[stream] ??=
                !OperatingSystem.IsWindows() ? new FileStream(new SafeFileHandle(stream, ownsHandle: false), FileAccess.Write, 0)
                : stream == Output ? Console.OpenStandardOutput() : Console.OpenStandardError();
            if (file.CanSeek)
            {
                file.Seek(0, SeekOrigin.End); // others write there as well
            }

            file.Write(bytes);
            return true;
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            return false;
        }
    }
}

/// <summary>One that takes lines: of messages, as syslog's, or a stream of them.</summary>
internal static class UnixSocket
{
    internal static Socket Connect(string path, SocketType type = SocketType.Dgram)
    {
        Socket socket = new(AddressFamily.Unix, type, ProtocolType.Unspecified);
        try
        {
            socket.Connect(new UnixDomainSocketEndPoint(path));
            return socket;
        }
        catch (SocketException e)
        {
            socket.Dispose();
            if (e.SocketErrorCode == SocketError.ProtocolType && type == SocketType.Dgram)
            {
                return Connect(path, SocketType.Stream);
            }

            throw;
        }
    }

    /// <summary>A message needs no newline.</summary>
    internal static void Send(Socket socket, ReadOnlySpan<byte> line) =>
        socket.Send(socket.SocketType == SocketType.Dgram ? line[..^1] : line);
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
            if (Libc.IsThere)
            {
                socket.SetRawSocketOption(SolIp, IpBindAddressNoPort, [1, 0, 0, 0]);
            }

            socket.Bind(new IPEndPoint(source, 0));
        }
    }

    internal static void ShutDown(Socket? socket, SocketShutdown how)
    {
        try
        {
            socket?.Shutdown(how);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // it has gone; whoever receives from it finds out why
        }
    }

    /// <summary>An error waits to be received, a reset above all. Poll's SelectError would also find urgent data. Without libc
    /// the error is taken: who asks ends the connection for it.</summary>
    internal static bool HasFailed(Socket socket)
    {
        Libc.PollDescriptor poll = new() { Descriptor = Libc.IsThere ? (int)socket.Handle : -1 };
        return Libc.IsThere ? Libc.Poll(ref poll, 1, 0) > 0 && (poll.Returned & Libc.PollError) != 0 : TakeError(socket);

        static bool TakeError(Socket socket)
        {
            try
            {
                return socket.GetSocketOption(SocketOptionLevel.Socket, SocketOptionName.Error) is not 0;
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                return false;
            }
        }
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

    /// <summary>EMFILE, ENFILE, ENOBUFS, ENOMEM.</summary>
    internal static bool AreExhausted(SocketError error) =>
        error is SocketError.TooManyOpenSockets or SocketError.NoBufferSpaceAvailable;

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

/// <summary>What this process takes; 0 where nobody knows.</summary>
internal static class Usage
{
    /// <summary>Bytes. Environment.WorkingSet would bring 14 KB along.</summary>
    internal static long Resident => OfStatus("VmRSS:") << 10;

    /// <summary>Listing /proc/self/fd would take 6 microseconds for each, asking poll(2) for all takes half of one.</summary>
    internal static long OpenDescriptors
    {
        get
        {
            const int Most = 256;
            Span<Libc.PollDescriptor> some = stackalloc Libc.PollDescriptor[Most];
            some = Descriptors.Limit is > 0 and < Most and long few ? some[..(int)few] : some; // poll takes no more
            long limit = Libc.IsThere ? OfStatus("FDSize:") : 0;
            long open = 0;
            for (int first = 0; first < limit; first += some.Length)
            {
                for (int i = 0; i < some.Length; i++)
                {
                    some[i] = new Libc.PollDescriptor { Descriptor = first + i };
                }

                _ = Libc.Poll(ref some[0], (nuint)some.Length, 0);
                foreach (Libc.PollDescriptor one in some)
                {
                    open += (one.Returned & Libc.PollInvalid) == 0 ? 1 : 0;
                }
            }

            return open;
        }
    }

    /// <summary>A number of proc_pid_status(5).</summary>
    private static long OfStatus(string key)
    {
        try
        {
            Span<byte> bytes = stackalloc byte[4096];
            using SafeFileHandle file = File.OpenHandle("/proc/self/status");
            string text = Encoding.UTF8.GetString(bytes[..RandomAccess.Read(file, bytes, 0)]);
            string line = Array.Find(text.Split('\n'), line => line.StartsWith(key, StringComparison.Ordinal)) ?? key;
            return long.TryParse(line[key.Length..].Replace(" kB", "", StringComparison.Ordinal), out long number) ? number : 0;
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            return 0;
        }
    }
}

/// <summary>Files that others wait for: they appear whole, or not at all. And those that are read as a whole.</summary>
internal static class WholeFile
{
    /// <summary>Without the mark that Windows' editors put in front.</summary>
    /// <exception cref="FormatException">it cannot be read, or is larger than <paramref name="most"/></exception>
    internal static ReadOnlySpan<byte> Read(string path, int most)
    {
        try
        {
            using FileStream stream = new(
                path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
            byte[] bytes = new byte[stream.CanSeek && stream.Length is > 0 and long size && size < most ? size + 1 : most + 1];
            int length = stream.ReadAtLeast(bytes, bytes.Length, throwOnEndOfStream: false);
            ReadOnlySpan<byte> text = length < bytes.Length ? bytes.AsSpan(0, length) : throw new FormatException(
                length > most ? $"{path} is larger than {most >> 20} MB" : $"{path} has grown while it was read");
            return text.StartsWith("\ufeff"u8) ? text[3..] : text;
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            throw new FormatException($"cannot read {path}: {Text.Reason(e)}");
        }
    }

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
        catch (Exception e) when (Text.IsOfFile(e))
        {
            throw new IOException($"cannot write {path}: {Text.Reason(e)}");
        }
    }

    /// <summary>Some time long ago for what is not there, or not ours to look at.</summary>
    internal static DateTime WrittenAt(string path)
    {
        try
        {
            return File.GetLastWriteTimeUtc(path);
        }
        catch (Exception e) when (Text.IsOfFile(e))
        {
            return default;
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
        catch (Exception e) when (Text.IsOfFile(e))
        {
            return e.HResult == (OperatingSystem.IsMacOS() ? MacNotSupported : Enxio);
        }
    }

    internal static void Remove(string path)
    {
        try
        {
            File.Delete(path);
        }
        catch (Exception e) when (Text.IsOfFile(e))
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
        bool isRefused = Libc.IsRefusal(error);
        if (!isRefused && error is not (Libc.Eagain or Libc.Eintr))
        {
            throw new SocketException((int)SocketError.ConnectionReset); // splice has taken the error off the socket
        }

        _isRefused |= isRefused;
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
    private static readonly List<int> Living = []; // not yet reaped, where we are process 1; under itself

    private readonly int _id;
    private bool _isKilled;

    private Child(int id, Socket pipe, Socket errors) => (_id, Pipe, Errors) = (id, pipe, errors);

    internal Socket Pipe { get; } // owned; disposed by Kill
    internal Socket Errors { get; } // its reader disposes it

    internal static bool IsOurs(int id)
    {
        lock (Living)
        {
            return Living.Contains(id);
        }
    }

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

        _ = Libc.Signal(Libc.SigChild, Libc.DefaultAction);
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
            : Spawn(out id, path, ends[1], ends[3], [.. words, null], [.. environment, null]);
        _ = Libc.Close(ends[1]);
        _ = Libc.Close(ends[3]);
        if (error == 0)
        {
            return new Child(id, SocketPair.Own(ends[0]), SocketPair.Own(ends[2]));
        }

        _ = Libc.Close(ends[0]);
        _ = Libc.Close(ends[2]);
        return null;
    }

    private static int Spawn(out int id, string path, int stdio, int stderr, string?[] words, string?[] environment)
    {
        if (!Orphans.AreOurs)
        {
            return Libc.Spawn(out id, path, stdio, stderr, words, environment);
        }

        lock (Living) // so that it is known before it is seen dead
        {
            int error = Libc.Spawn(out id, path, stdio, stderr, words, environment);
            Living.AddRange(error == 0 ? [id] : []);
            return error;
        }
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

        lock (Living)
        {
            Living.Remove(_id);
        }
    }
}

/// <summary>Orphans, which process 1 (the only program of a container) gets for its children: they are reaped, those of
/// <see cref="Child"/> are left to it.</summary>
internal sealed class Orphans : Watched
{
    private const int Pause = 1000; // ms between two looks

    private long _due;

    internal static bool AreOurs { get; } = Libc.IsThere && Environment.ProcessId == 1;

    internal static void Adopt()
    {
        if (AreOurs)
        {
            Sweep.Add(new Orphans());
        }
    }

    internal override bool Check(long now)
    {
        if (now >= _due)
        {
            _due = now + Pause;
            while (FirstDead() is > 0 and int id && !Child.IsOurs(id))
            {
                Libc.ChildStatus status = default;
                _ = Libc.Wait(Libc.WaitProcess, id, ref status, Libc.WaitExited | Libc.WaitNoHang);
            }
        }

        return false;
    }

    private static int FirstDead()
    {
        Libc.ChildStatus status = default;
        return Libc.Wait(Libc.WaitAny, 0, ref status, Libc.WaitExited | Libc.WaitNoHang | Libc.WaitNoReap) == 0 ? status.Id : 0;
    }
}

/// <summary>A user to become. A static executable cannot ask the name services: the files say who it is.</summary>
internal sealed class Account
{
    private const int LargestFile = 16 << 20; // bytes

    private readonly string _text; // as it was typed
    private readonly uint _user;
    private readonly uint _group;
    private readonly List<uint> _groups = []; // _group as well
    private readonly bool _isNeeded;

    /// <summary>NAME[:GROUP]</summary>
    /// <exception cref="IOException">there is no such user or group, or no right to become it</exception>
    internal Account(string text)
    {
        _text = text;
        string[] parts = text.Split(':');
        bool isGroupGiven = parts.Length > 1;
        string[]? user = Entry("/etc/passwd", parts[0]);
        _user = Id(user?[2] ?? parts[0], "user", parts[0], "/etc/passwd");
        _group = isGroupGiven ? Id(Entry("/etc/group", parts[1])?[2] ?? parts[1], "group", parts[1], "/etc/group")
            : user is not null ? Id(user[3], "group", user[3], "/etc/passwd")
            : throw Wrong($"is not in /etc/passwd, so that its group is not known; write {text}:GROUP");
        _groups.Add(_group);
        foreach (string[] entry in Entries("/etc/group"))
        {
            if (user is not null && entry.Length > 3 && Array.IndexOf(entry[3].Split(','), user[0]) >= 0)
            {
                _groups.Add(Id(entry[2], "group", entry[0], "/etc/group"));
            }
        }

        _ = Libc.GetUsers(out _, out uint effective, out _) + Libc.GetGroups(out _, out uint effectiveGroup, out _);
        _isNeeded = effective == 0;
        if (_isNeeded ? _user == 0 : _user != effective || (isGroupGiven && _group != effectiveGroup))
        {
            throw Wrong(_isNeeded ? "is root, which shall be given up" : "is another user, which only root may become");
        }
    }

    /// <exception cref="FormatException">it cannot be one</exception>
    internal static string Check(string text)
    {
        string[] parts = text.Split(':');
        return !Libc.IsThere ? throw new FormatException("works on Linux only")
            : parts.Length <= 2 && Array.TrueForAll(parts, part => part.Length > 0) ? text
            : throw new FormatException($"'{text}' is not NAME or NAME:GROUP");
    }

    /// <summary>No program that this thread, or one that comes from it, starts from here on has more rights than we.</summary>
    internal void Prepare()
    {
        if (Libc.Control(Libc.SetNoNewPrivileges, 1) != 0)
        {
            throw Wrong("cannot be kept from new privileges (prctl)");
        }
    }

    /// <summary>The real, effective and saved ids of all threads (which libc sees to), for good.</summary>
    /// <exception cref="IOException">it does not go, or there is a way back</exception>
    internal void Become()
    {
        uint[] groups = [.. _groups];
        if (_isNeeded && (Libc.SetGroups((nuint)groups.Length, in groups[0]) != 0
            || Libc.SetGroups(_group, _group, _group) != 0 || Libc.SetUsers(_user, _user, _user) != 0))
        {
            throw Wrong($"cannot be taken on: {Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError())}");
        }

        _ = Libc.GetUsers(out uint real, out uint effective, out uint saved);
        if (real != _user || effective != _user || saved != _user || Libc.SetUsers(0, 0, 0) == 0)
        {
            throw Wrong("could become root again");
        }
    }

    private static uint Id(string number, string what, string name, string file) => // -1 is nobody
        uint.TryParse(number, NumberStyles.None, CultureInfo.InvariantCulture, out uint id) && id < uint.MaxValue ? id
        : throw new IOException($"--user: there is no {what} {name} in {file}; one of elsewhere is given by its number");

    private static string[]? Entry(string file, string name) => Array.Find(
        Entries(file), entry => entry.Length > 3 && (entry[0] == name || (Text.IsDigits(name) && entry[2] == name)));

    private static string[][] Entries(string file) => !File.Exists(file) ? []
        : Array.ConvertAll(Encoding.UTF8.GetString(WholeFile.Read(file, LargestFile)).Split('\n'), line => line.Split(':'));

    private IOException Wrong(string what) => new($"--user: {_text} {what}");
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
    internal const int SetStatusFlags = 4;
    internal const int Append = 0x400;
    internal const int CloseOnExec = 1;
    internal const short PollOut = 4;
    internal const short PollError = 8;
    internal const short PollInvalid = 32;
    internal const int UnixFamily = 1;
    internal const int StreamSocket = 1;
    internal const int CloseOnExecSocket = 0x80000;
    internal const int Emfile = 24;
    internal const int DefaultAction = 0; // SIG_DFL
    internal const int Ignore = 1; // SIG_IGN
    internal const int SigHangUp = 1;
    internal const int SigFileSize = 25; // SIGXFSZ
    internal const int SigKill = 9;
    internal const int SigChild = 17;
    internal const int WaitAny = 0; // P_ALL
    internal const int WaitProcess = 1; // P_PID
    internal const int WaitGroup = 2; // P_PGID
    internal const int WaitNoHang = 1;
    internal const int WaitExited = 4;
    internal const int WaitNoReap = 0x1000000; // WNOWAIT
    internal const int SetNoNewPrivileges = 38; // PR_SET_NO_NEW_PRIVS
    internal const int ChildExited = 1; // CLD_EXITED; the others are CLD_KILLED and CLD_DUMPED

    /// <summary>The numbers above and below are Linux's, on x64 and arm64. TCPPROXY_PORTABLE=1 is for the tests.</summary>
    internal static bool IsThere { get; } =
        OperatingSystem.IsLinux() && Environment.GetEnvironmentVariable("TCPPROXY_PORTABLE") != "1";

    /// <summary>Of a system call, not of what it was to work on: EPERM, ENOMEM, EACCES, EINVAL, ENOSYS, EOPNOTSUPP.</summary>
    internal static bool IsRefusal(int error) => error is 1 or 12 or 13 or 22 or 38 or 95;

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
    internal static partial int GetLimit(int resource, out Limit limit);

    [LibraryImport("libc", EntryPoint = "setrlimit")]
    internal static partial int SetLimit(int resource, in Limit limit);

    [LibraryImport("libc", EntryPoint = "write", SetLastError = true)]
    internal static partial nint Write(int descriptor, in byte bytes, nuint count);

    [LibraryImport("libc", EntryPoint = "isatty")]
    internal static partial int IsTerminal(int descriptor);

    [LibraryImport("libc", EntryPoint = "poll")]
    internal static partial int Poll(ref PollDescriptor descriptor, nuint count, int timeout);

    [LibraryImport("libc", EntryPoint = "fcntl")]
    internal static partial int Fcntl(int descriptor, int command, nint argument = 0);

    [LibraryImport("libc", EntryPoint = "socketpair")]
    internal static partial int OpenSocketPair(int family, int type, int protocol, ref int ends);

    [LibraryImport("libc", EntryPoint = "pipe2")]
    internal static partial int OpenPipe(ref int ends, int flags);

    [LibraryImport("libc", EntryPoint = "splice", SetLastError = true)]
    internal static partial nint Splice(
        SafeHandle from, nint fromOffset, SafeHandle to, nint toOffset, nuint length, uint flags);

    [LibraryImport("libc", EntryPoint = "read")]
    internal static partial nint Read(SafeHandle descriptor, ref byte bytes, nuint count);

    [LibraryImport("libc", EntryPoint = "ioctl")]
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

    /// <summary>Blocks of the disk for bytes that are to be written; its length remains.</summary>
    internal static void Reserve(SafeHandle file, long offset, long length) =>
        _ = IsThere ? Allocate(file, 1, offset, length) : 0; // FALLOC_FL_KEEP_SIZE; not every file system can

    [LibraryImport("libc", EntryPoint = "fallocate")]
    private static partial int Allocate(SafeHandle file, int mode, long offset, long length);

    [LibraryImport("libc", EntryPoint = "close")]
    internal static partial int Close(int descriptor);

    [LibraryImport("libc", EntryPoint = "kill")]
    internal static partial int Kill(int id, int signal);

    [LibraryImport("libc", EntryPoint = "signal")]
    internal static partial nint Signal(int signal, nint handler);

    [LibraryImport("libc", EntryPoint = "waitid")]
    internal static partial int Wait(int kind, int id, ref ChildStatus status, int options);

    [LibraryImport("libc", EntryPoint = "prctl")]
    internal static partial int Control(int option, nuint value, nuint third = 0, nuint fourth = 0, nuint fifth = 0);

    [LibraryImport("libc", EntryPoint = "getresuid")]
    internal static partial int GetUsers(out uint real, out uint effective, out uint saved);

    [LibraryImport("libc", EntryPoint = "getresgid")]
    internal static partial int GetGroups(out uint real, out uint effective, out uint saved);

    [LibraryImport("libc", EntryPoint = "setresuid", SetLastError = true)]
    internal static partial int SetUsers(uint real, uint effective, uint saved);

    [LibraryImport("libc", EntryPoint = "setresgid", SetLastError = true)]
    internal static partial int SetGroups(uint real, uint effective, uint saved);

    [LibraryImport("libc", EntryPoint = "setgroups", SetLastError = true)]
    internal static partial int SetGroups(nuint count, in uint groups);
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

    /// <summary>IPv4 without the IPv6 around it, IPv6 without a scope; null where there is neither.</summary>
    internal static IPAddress? Of(EndPoint? endPoint) => endPoint is not IPEndPoint { Address: var address } ? null
        : address.IsIPv4MappedToIPv6 ? address.MapToIPv4() : new IPAddress(address.GetAddressBytes());

    internal string Text { get; } = text; // as it was written
    internal AddressKind Kind { get; } = kind;
    internal string Host { get; } = host; // or the path, or the descriptor's number or name; "" = all interfaces
    internal int PortCount => lastPort - port + 1;
    internal bool IsPrivileged => Kind is AddressKind.Tcp or AddressKind.Loopback && port is > 0 and < 1024;

    public override string ToString() => Text;

    /// <summary>The port at a place in the range; a single port stands for all.</summary>
    internal int PortAt(int index) => PortCount == 1 ? port : port + index;

    /// <summary>HOST:PORT, [v6]:PORT or HOST:P1-P2 to its parts. Ports alone have no host: null.</summary>
    /// <exception cref="FormatException">it is none</exception>
    protected static (string? Host, int Port, int LastPort) Split(string text, bool isListen)
    {
        bool isBare = text.Length > 0 && char.IsAsciiDigit(text[0]) && TcpProxy.Text.IsOf(text, '-');
        int colon = text.LastIndexOf(':');
        string? host = isBare ? null : colon >= 0 ? text[..colon]
            : throw new FormatException($"'{text}' has no port; an address is HOST:PORT");
        if (host is ['[', .., ']'])
        {
            host = host[1..^1];
            if (!IPAddress.TryParse(host, out IPAddress? v6) || v6.AddressFamily != AddressFamily.InterNetworkV6)
            {
                throw new FormatException($"'{host}' is not an IPv6 address");
            }
        }
        else if (host is not null && host.Contains(':', StringComparison.Ordinal))
        {
            throw new FormatException(IPAddress.TryParse(text, out _)
                ? $"'{text}' has no port, or no brackets; an IPv6 address is written '[{text}]:PORT'"
                : $"'{text}' is not an address; an IPv6 address is written '[::1]:PORT'");
        }
        else if (host?.Length > 0 && !(isListen && host == "*"))
        {
            CheckHost(host);
        }

        (int first, int last) = Ports(text[(colon + 1)..], text, isListen);
        return (host == "*" ? "" : host, first, last);
    }

    private static (int First, int Last) Ports(string ports, string text, bool isListen)
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
        string? wrong = host.Length > Longest ? $"a host name of {host.Length} characters; it has at most {Longest}"
            : Array.Exists(host.ToCharArray(), c => !char.IsLetterOrDigit(c) && c is not ('.' or '-' or '_'))
                ? $"'{host}' is not a host name or IP address"
            : host.Contains("..", StringComparison.Ordinal) ? $"'{host}' is not a host name: it has two dots in a row"
            : TcpProxy.Text.IsOf(host, '.') && (!IPAddress.TryParse(host, out _) || host.Split('.').Length != 4)
                ? $"'{host}' is not an IPv4 address" : null;
        if (wrong is not null)
        {
            throw new FormatException(wrong);
        }
    }

    /// <summary>The rest of <paramref name="text"/> after a prefix such as unix: or null.</summary>
    protected static string? After(string prefix, string text, string what) =>
        !text.StartsWith(prefix, StringComparison.Ordinal) ? null
        : text.Length > prefix.Length ? text[prefix.Length..]
        : throw new FormatException($"'{text}' has no {what}");

    internal static string CheckPath(string path) =>
        Encoding.UTF8.GetByteCount(TcpProxy.Text.FileName(path)) <= LongestPath ? path
            : throw new FormatException($"'{path}' is longer than the {LongestPath} bytes of a unix socket's path");
}

internal sealed class ListenAddress(string text, AddressKind kind, string host, int port = 0, int lastPort = 0)
    : Address(text, kind, host, port, lastPort)
{
    /// <summary>PATH or unix:PATH</summary>
    internal static string ParsePath(string text) => CheckPath(After("unix:", text, "path") ?? text);

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

        (string? host, int port, int lastPort) = Split(text, isListen: true);
        return new(text, host is null or "localhost" ? AddressKind.Loopback : AddressKind.Tcp, host ?? "", port, lastPort);
    }
}

internal sealed class UpstreamAddress(string text, AddressKind kind, string host, int port = 0, int lastPort = 0)
    : Address(text, kind, host, port, lastPort)
{
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

        if (TcpProxy.Text.Nearest(text, "echo", "discard") is { } near && !text.Contains(':', StringComparison.Ordinal))
        {
            throw new FormatException($"'{text}' has no port; an address is HOST:PORT; did you mean '{near}'?");
        }

        (string? host, int port, int lastPort) = Split(text, isListen: false);
        return host is not "" ? new(text, AddressKind.Tcp, host ?? "localhost", port, lastPort)
            : throw new FormatException($"'{text}' has no host; for this machine write '{text[1..]}'");
    }
}

/// <summary>A network; one address, which is a network of itself alone; or all who come by a unix socket. IPv4 stands as
/// ::ffff:a.b.c.d, however it was written (RFC 4291, 2.5.5.2), and yet apart from IPv6: ::/0 is not about it.</summary>
internal readonly struct Network : IComparable<Network> // 24 bytes: lists may be long
{
    private const int Mapped = 96; // bits in front of the IPv4 address
    private const byte V4 = 4; // families
    private const byte V6 = 6;

    private readonly ulong _high;
    private readonly ulong _low;
    private readonly byte _bits; // of 128
    private readonly byte _family; // 0 = unix

    private Network(IPAddress address, int bits, int line)
    {
        Span<byte> bytes = stackalloc byte[16];
        bool isShort = BitsOf(address) == 32;
        bytes.Clear();
        bytes[10..12].Fill(byte.MaxValue);
        address.TryWriteBytes(isShort ? bytes[12..] : bytes, out _);
        (_high, _low) = (BinaryPrimitives.ReadUInt64BigEndian(bytes), BinaryPrimitives.ReadUInt64BigEndian(bytes[8..]));
        _bits = (byte)(isShort ? Mapped + bits : bits);
        _family = isShort || (address.IsIPv4MappedToIPv6 && bits >= Mapped) ? V4 : V6;
        Line = line;
    }

    internal int Line { get; private init; } // of the list that it stands in
    internal UInt128 First => new(_high, _low);
    internal bool IsV4 => _family == V4;
    internal bool IsUnix => _family == 0;

    /// <summary>For a search: it stands behind all that have it.</summary>
    internal Network AfterAll => this with { Line = int.MaxValue };

    /// <summary>The address of a client.</summary>
    internal static Network Of(EndPoint? client) => client is not IPEndPoint { Address: var address } ? default
        : new Network(address, BitsOf(address), 0);

    /// <exception cref="FormatException">it is no network</exception>
    internal static Network Parse(string text) => Parse(Encoding.UTF8.GetBytes(text), 0);

    /// <summary>10.0.0.0/8, 2001:db8::/32, an address, or unix.</summary>
    /// <exception cref="FormatException">it is none of them</exception>
    internal static Network Parse(ReadOnlySpan<byte> text, int line)
    {
        if (text.SequenceEqual("unix"u8))
        {
            return new Network { Line = line };
        }

        int slash = text.IndexOf((byte)'/');
        ReadOnlySpan<byte> host = slash < 0 ? text : text[..slash];
        if (!IPAddress.TryParse(host, out IPAddress? address) || !IsPlain(host, address))
        {
            throw new FormatException(
                $"'{Encoding.UTF8.GetString(text)}' is not a network; write 10.0.0.0/8, 2001:db8::/32, an address or unix");
        }

        int most = BitsOf(address);
        int bits = slash < 0 ? most : Units.ParseCount(Encoding.UTF8.GetString(text[(slash + 1)..]), most: most);
        Network network = new(address, bits, line);
        return (network.First & ~network.Mask) == 0 ? network : throw new FormatException(
            $"'{Encoding.UTF8.GetString(text)}' has bits beyond its prefix; did you mean '{new IPNetwork(address, bits)}'?");
    }

    internal bool Has(in Network other) =>
        _family == other._family && _bits <= other._bits && ((First ^ other.First) & Mask) == 0;

    /// <summary>In the order of their first addresses; a network stands before those within it, and of two that are the same
    /// the one of the earlier line.</summary>
    public int CompareTo(Network other) =>
        _family != other._family ? _family.CompareTo(other._family)
        : _high != other._high ? _high.CompareTo(other._high)
        : _low != other._low ? _low.CompareTo(other._low)
        : _bits != other._bits ? _bits.CompareTo(other._bits) : Line.CompareTo(other.Line);

    private UInt128 Mask => _bits == 0 ? 0 : UInt128.MaxValue << (128 - _bits);

    private static int BitsOf(IPAddress address) => address.AddressFamily == AddressFamily.InterNetwork ? 32 : 128;

    /// <summary>Not 10.1, and not 010.0.0.1, which is 8.0.0.1 to some; without brackets and zone.</summary>
    private static bool IsPlain(ReadOnlySpan<byte> host, IPAddress address)
    {
        Span<byte> text = stackalloc byte[16];
        return host.Contains((byte)':') ? host.IndexOfAny((byte)'[', (byte)'%') < 0
            : address.TryFormat(text, out int length) && host.SequenceEqual(text[..length]);
    }
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
        int digits = text.AsSpan().IndexOfAnyExceptInRange('0', '9');
        digits = digits < 0 ? text.Length : digits;
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

    /// <summary>How long something has lasted, in the two units that matter.</summary>
    internal static string Words(TimeSpan time) =>
        time.TotalDays >= 1 ? $"{time.Days}d {time.Hours}h" : time.TotalHours >= 1 ? $"{time.Hours}h {time.Minutes}m"
        : time.TotalMinutes >= 1 ? $"{time.Minutes}m {time.Seconds}s" : $"{time.Seconds}s";

    /// <summary>2026-11-23T08:30, local, or UTC with a Z behind it.</summary>
    /// <exception cref="FormatException">there is no such moment</exception>
    internal static DateTime ParseMoment(string text) =>
        DateTime.TryParseExact(text, "yyyy-MM-ddTHH:mmK", CultureInfo.InvariantCulture,
            DateTimeStyles.AssumeLocal | DateTimeStyles.AdjustToUniversal, out DateTime utc) ? utc
        : throw new FormatException($"'{text}' is not a time; write 2026-11-23T08:30, or 2026-11-23T08:30Z for UTC");

    /// <exception cref="FormatException">it is no size, or not between the bounds</exception>
    internal static long ParseSize(string text, long least = 0, long most = 1L << 60)
    {
        int shift = text.Length == 0 ? 0 : 10 * ("kmg".IndexOf(char.ToLowerInvariant(text[^1]), StringComparison.Ordinal) + 1);
        string digits = text == "off" ? "0" : shift == 0 ? text : text[..^1];
        if (!long.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out long value))
        {
            throw new FormatException($"'{text}' is not a size; write 512, 64k, 10m or 1g{(least == 0 ? ", or off" : "")}");
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

    /// <summary>RFC 3339 with milliseconds.</summary>
    internal static string Of(DateTime utc) => $"{utc.ToString("O", CultureInfo.InvariantCulture).AsSpan(0, 23)}Z";

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
        ArgumentOutOfRangeException => "file too large",
        _ => e.Message.Length > 0 ? e.Message.TrimEnd('.') : e.GetType().Name,
    };

    /// <summary>What a file that cannot be opened, read or written throws. One that may not grow (ulimit -f, 4 GB on FAT) is
    /// out of range.</summary>
    internal static bool IsOfFile(Exception e) => e is IOException or UnauthorizedAccessException or ArgumentOutOfRangeException;

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

    /// <summary>Says in front of what is wrong where it stands.</summary>
    internal static void At(string where, Action read)
    {
        try
        {
            read();
        }
        catch (FormatException e)
        {
            throw new FormatException($"{where}: {e.Message}");
        }
    }

    /// <summary>Text with the escapes \n \r \t \0 \\ and \xNN, as bytes.</summary>
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
                int plain = i < text.Length ? "nrt0\\".IndexOf(text[i], StringComparison.Ordinal) : -1;
                bytes.Add(plain >= 0 ? "\n\r\t\0\\"u8[plain]
                    : i + 2 < text.Length && text[i] == 'x'
                        && byte.TryParse(text.AsSpan(i + 1, 2), NumberStyles.AllowHexSpecifier, null, out byte code) ? code
                    : throw new FormatException($"'{text}': a backslash stands before n, r, t, 0, another backslash or xNN"));
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

    /// <summary>A word for ExecStart (systemd.service(5), "Command lines"): C's escapes in quotes, % and $ twice. The program
    /// itself, and other settings, know no $.</summary>
    internal static string QuoteForSystemd(string word, bool isProgram)
    {
        StringBuilder quoted = new();
        bool isPlain = word.Length > 0;
        foreach (char c in word)
        {
            isPlain &= char.IsAsciiLetterOrDigit(c) || c is '-' or '_' or '.' or ',' or ':' or '/' or '=' or '+' or '%' or '@';
            _ = c < ' ' ? quoted.Append("\\x").Append(((int)c).ToString("x2", CultureInfo.InvariantCulture))
                : c is '"' or '\\' ? quoted.Append('\\').Append(c)
                : c == '%' || (c == '$' && !isProgram) ? quoted.Append(c, 2) : quoted.Append(c);
        }

        return isPlain ? quoted.ToString() : $"\"{quoted}\"";
    }

    /// <summary>A word as programs on Windows split their command line: quotes, before which backslashes are doubled.</summary>
    internal static string QuoteForWindows(string word)
    {
        if (word.Length > 0 && word.AsSpan().IndexOfAny(" \t\"") < 0)
        {
            return word;
        }

        StringBuilder quoted = new("\"");
        int backslashes = 0; // right before
        foreach (char c in word)
        {
            quoted.Append('\\', c == '"' ? backslashes + 1 : 0).Append(c);
            backslashes = c == '\\' ? backslashes + 1 : 0;
        }

        return quoted.Append('\\', backslashes).Append('"').ToString();
    }

    /// <summary>What came from outside, without anything that a terminal or a parser could take for more: JSON's
    /// escapes (RFC 8259, 7), which logfmt shares.</summary>
    internal static string Escape(string text)
    {
        int safe = 0; // characters
        while (safe < text.Length && IsSafe(text[safe]))
        {
            safe++;
        }

        if (safe == text.Length)
        {
            return text;
        }

        StringBuilder escaped = new(text[..safe]);
        foreach (char c in text.AsSpan(safe))
        {
            _ = c switch
            {
                '"' or '\\' => escaped.Append('\\').Append(c),
                '\n' => escaped.Append("\\n"),
                '\r' => escaped.Append("\\r"),
                '\t' => escaped.Append("\\t"),
                _ when IsSafe(c) => escaped.Append(c),
                _ => escaped.Append("\\u").Append(((int)c).ToString("x4", CultureInfo.InvariantCulture)),
            };
        }

        return escaped.ToString();
    }

    /// <summary>No control character (C0, C1), line end or change of direction, and no mark of the escapes.</summary>
    private static bool IsSafe(char c) => c is >= ' ' and not ('"' or '\\' or (>= '\u007f' and <= '\u009f')
        or (>= '\u2028' and <= '\u202e') or (>= '\u2066' and <= '\u2069'));
}
