using System;
using System.Diagnostics;
using System.Diagnostics.CodeAnalysis;
using System.Linq;
using System.Numerics;
using System.Runtime.InteropServices;
using System.Threading;

namespace TcpProxy.Bench;

/// <summary>What a listener of the backend does with a connection.</summary>
internal enum Service
{
    /// <summary>Counts what arrives.</summary>
    Sink,

    /// <summary>Sends between a 'G' and an 'S' from the client.</summary>
    Source,

    /// <summary>Answers every message of the agreed size with one of that size.</summary>
    Reply,

    /// <summary>Answers 64 bytes with 64 bytes and closes.</summary>
    Close,
}

/// <summary>What the backend has seen since a measurement began. Written by its thread alone.</summary>
internal sealed class Counters(int messageSize)
{
    internal readonly int MessageSize = messageSize;
    internal long Received;
    internal long Sent;
    internal long Stops;
    internal long LastArrival;
}

/// <summary>An epoll instance and its events. Keys say whose event it was.</summary>
internal sealed unsafe class Poll : IDisposable
{
    private const int Capacity = 512;

    // struct epoll_event is packed on x64 and only there.
    private static readonly int Stride = RuntimeInformation.ProcessArchitecture == Architecture.X64 ? 12 : 16;

    private readonly byte* _events = (byte*)NativeMemory.AllocZeroed(Capacity, 16);
    private readonly int _fd = Libc.Check(Libc.epoll_create1(0x80000), "epoll_create1");

    internal int Wait(int milliseconds) => Math.Max(0, Libc.epoll_wait(_fd, _events, Capacity, milliseconds));

    internal uint Events(int index) => *(uint*)(_events + (index * Stride));

    internal int Key(int index) => *(int*)(_events + (index * Stride) + Stride - 8);

    internal void Add(int fd, uint events, int key) => Control(1, fd, events, key);

    internal void Change(int fd, uint events, int key) => Control(3, fd, events, key);

    internal void Remove(int fd) => Control(2, fd, 0, 0);

    private void Control(int operation, int fd, uint events, int key)
    {
        byte* item = stackalloc byte[16];
        *(uint*)item = events;
        *(long*)(item + Stride - 8) = key;
        Libc.Check(Libc.epoll_ctl(_fd, operation, fd, item), "epoll_ctl");
    }

    public void Dispose()
    {
        _ = Libc.close(_fd);
        NativeMemory.Free(_events);
    }
}

/// <summary>Memory that both sides send from and receive into; nobody reads what is in it.</summary>
internal static unsafe class Payload
{
    internal const int Chunk = 256 * 1024;
    internal const int Most = 1024 * 1024;
    internal static readonly byte* Data = Fill();
    internal static readonly byte* Scratch = (byte*)NativeMemory.AllocZeroed(Most);

    private static byte* Fill()
    {
        byte* data = (byte*)NativeMemory.Alloc(Chunk);
        new Random(4711).NextBytes(new Span<byte>(data, Chunk));
        return data;
    }
}

/// <summary>The servers behind the proxy: one thread, one epoll, a listener a service.</summary>
[SuppressMessage("Design", "CA1001", Justification = "Its thread uses the poll until the process ends.")]
internal sealed unsafe class Backend
{
    private readonly Poll _poll = new();
    private readonly int[] _ports = new int[4];
    private readonly int[] _listeners = new int[4];
    private Connection?[] _connections = new Connection?[4096];
    private Counters _counters = new(1);

    internal Backend(Func<int> freePort)
    {
        for (int service = 0; service < _listeners.Length; service++)
        {
            _ports[service] = freePort();
            _listeners[service] = Libc.Check(Libc.Listen(_ports[service]), "backend");
            _poll.Add(_listeners[service], Libc.In, _listeners[service]);
        }
        new Thread(Serve) { IsBackground = true, Name = "backend" }.Start();
    }

    internal int Port(Service service) => _ports[(int)service];

    /// <summary>Connections accepted from now on count into the counters returned.</summary>
    internal Counters Begin(int messageSize)
    {
        Counters counters = new(messageSize);
        Volatile.Write(ref _counters, counters);
        return counters;
    }

    private void Serve()
    {
        while (true)
        {
            int count = _poll.Wait(-1);
            for (int i = 0; i < count; i++)
            {
                int fd = _poll.Key(i);
                int service = Array.IndexOf(_listeners, fd);
                if (service >= 0)
                {
                    Accept(fd, (Service)service);
                    continue;
                }
                Connection connection = _connections[fd]!;
                if (connection.Open && !Handle(connection, _poll.Events(i)))
                {
                    connection.Open = false;
                    _ = Libc.close(fd);
                }
            }
        }
    }

    private void Accept(int listener, Service service)
    {
        for (int i = 0; i < 64; i++)
        {
            int fd = Libc.Accept(listener);
            if (fd < 0)
            {
                return;
            }
            if (fd >= _connections.Length)
            {
                Array.Resize(ref _connections, Math.Max(fd + 1, _connections.Length * 2));
            }
            // One object a descriptor, for ever: the connection rate does not feed the collector.
            Connection connection = _connections[fd] ??= new Connection(fd);
            connection.Begin(service, Volatile.Read(ref _counters));
            _poll.Add(fd, Libc.In, fd);
        }
    }

    private bool Handle(Connection connection, uint events) => connection.Service switch
    {
        Service.Sink => Sink(connection),
        Service.Source => Source(connection, events),
        Service.Reply => Reply(connection, events),
        _ => CloseAfterReply(connection),
    };

    private static bool Sink(Connection connection)
    {
        Counters counters = connection.Counters;
        for (int i = 0; i < 4; i++)
        {
            nint received = Receive(connection.Fd, Payload.Most, Libc.Discard);
            if (received <= 0)
            {
                return received < 0 && Libc.Error == Libc.Eagain;
            }
            counters.LastArrival = Stopwatch.GetTimestamp();
            Volatile.Write(ref counters.Received, counters.Received + received);
        }
        return true;
    }

    private bool Source(Connection connection, uint events)
    {
        Counters counters = connection.Counters;
        if ((events & Libc.In) != 0)
        {
            nint received = Receive(connection.Fd, 256, 0);
            if (received <= 0)
            {
                return received < 0 && Libc.Error == Libc.Eagain;
            }
            foreach (byte command in new ReadOnlySpan<byte>(Payload.Scratch, (int)received))
            {
                connection.Sending = command == (byte)'G';
                if (!connection.Sending)
                {
                    Volatile.Write(ref counters.Stops, counters.Stops + 1);
                }
            }
            Want(connection, connection.Sending ? Libc.In | Libc.Out : Libc.In);
        }
        else if ((events & Libc.Failed) != 0)
        {
            return false;
        }
        for (int i = 0; connection.Sending && i < 4; i++)
        {
            nint sent = Send(connection.Fd, Payload.Chunk);
            if (sent < 0)
            {
                return Libc.Error == Libc.Eagain;
            }
            Volatile.Write(ref counters.Sent, counters.Sent + sent);
            if (sent < Payload.Chunk)
            {
                break;
            }
        }
        return true;
    }

    private bool Reply(Connection connection, uint events)
    {
        if ((events & Libc.Out) != 0)
        {
            return Flush(connection);
        }
        int size = connection.Counters.MessageSize;
        nint received = Receive(connection.Fd, size - connection.Have, Libc.Discard);
        if (received <= 0)
        {
            return received < 0 && Libc.Error == Libc.Eagain;
        }
        connection.Have += (int)received;
        if (connection.Have < size)
        {
            return true;
        }
        connection.Have = 0;
        connection.Owed = size;
        return Flush(connection);
    }

    private bool Flush(Connection connection)
    {
        while (connection.Owed > 0)
        {
            nint sent = Send(connection.Fd, connection.Owed);
            if (sent < 0)
            {
                if (Libc.Error != Libc.Eagain)
                {
                    return false;
                }
                Want(connection, Libc.Out);
                return true;
            }
            connection.Owed -= (int)sent;
        }
        Want(connection, Libc.In);
        return true;
    }

    private static bool CloseAfterReply(Connection connection)
    {
        nint received = Receive(connection.Fd, ConnectRate.Size, 0);
        if (received <= 0)
        {
            return received < 0 && Libc.Error == Libc.Eagain;
        }
        connection.Have += (int)received;
        if (connection.Have < ConnectRate.Size)
        {
            return true;
        }
        _ = Send(connection.Fd, ConnectRate.Size);
        return false;
    }

    private void Want(Connection connection, uint events)
    {
        if (connection.Events != events)
        {
            connection.Events = events;
            _poll.Change(connection.Fd, events, connection.Fd);
        }
    }

    private static nint Receive(int fd, int most, int flags) =>
        Libc.recv(fd, Payload.Scratch, most, flags | Libc.DontWait);

    private static nint Send(int fd, int length) =>
        Libc.send(fd, Payload.Data, length, Libc.DontWait | Libc.NoSignal);

    private sealed class Connection(int fd)
    {
        internal readonly int Fd = fd;
        internal Counters Counters = null!;
        internal Service Service;
        internal uint Events;
        internal bool Open;
        internal bool Sending;
        internal int Have;
        internal int Owed;

        internal void Begin(Service service, Counters counters)
        {
            (Service, Counters, Events, Open) = (service, counters, Libc.In, true);
            (Sending, Have, Owed) = (false, 0, 0);
        }
    }
}

/// <summary>Latencies in buckets of 0.8 %: adding one costs a few instructions and no memory.</summary>
internal sealed class Histogram
{
    private const int Bits = 7;
    private readonly long[] _buckets = new long[64 << Bits];
    private long _count;

    internal void Clear()
    {
        Array.Clear(_buckets);
        _count = 0;
    }

    internal void Add(long nanoseconds)
    {
        ulong value = (ulong)Math.Max(0, nanoseconds);
        int log = BitOperations.Log2(value | 1);
        int bucket = log < Bits
            ? (int)value
            : ((log - Bits + 1) << Bits) + (int)((value >> (log - Bits)) & ((1 << Bits) - 1));
        _buckets[bucket]++;
        _count++;
    }

    internal double Microseconds(double percentile)
    {
        long wanted = Math.Max(1, (long)((percentile / 100 * _count) + 0.5));
        int bucket = 0;
        for (long seen = _buckets[0]; seen < wanted && bucket < _buckets.Length - 1;)
        {
            seen += _buckets[++bucket];
        }
        if (bucket < 1 << Bits)
        {
            return bucket / 1000.0;
        }
        int shift = (bucket >> Bits) - 1;
        ulong low = (ulong)((1 << Bits) | (bucket & ((1 << Bits) - 1))) << shift;
        return (low + ((1UL << shift) / 2.0)) / 1000.0;
    }
}

/// <summary>What one phase of load did, once everything in flight had arrived.</summary>
internal readonly record struct Work(double Units, double Seconds);

/// <summary>A load from one thread. A phase applies it and ends when nothing is in flight.</summary>
internal abstract unsafe class Load : IDisposable
{
    private const double PatienceSeconds = 5;

    protected Load(int port, int connections, Counters counters)
    {
        Port = port;
        Counters = counters;
        Flows = [.. Enumerable.Range(0, connections).Select(key => new Flow(key))];
    }

    internal Histogram Latency { get; } = new();
    internal int Errors { get; private protected set; }
    protected int Port { get; }
    protected Counters Counters { get; }
    protected Poll Poll { get; } = new();
    protected Flow[] Flows { get; }

    /// <summary>The connections that a load keeps for its phases.</summary>
    internal virtual void Open()
    {
        long limit = After(PatienceSeconds);
        foreach (Flow flow in Flows)
        {
            flow.Fd = Libc.Check(Libc.Connect(Port, 3), "connect");
            Poll.Add(flow.Fd, FirstEvents, flow.Key);
            if (Stopwatch.GetTimestamp() > limit)
            {
                throw new BenchException($"only {flow.Key + 1} connections in {PatienceSeconds} s");
            }
            if (Flows.Length > 1)
            {
                _ = Libc.usleep(150); // small backlogs are not what is measured here
            }
        }
    }

    internal abstract Work Run(double seconds);

    protected abstract uint FirstEvents { get; }

    protected static long After(double seconds) =>
        Stopwatch.GetTimestamp() + (long)(seconds * Stopwatch.Frequency);

    protected static double Between(long start, long end) => (end - start) / (double)Stopwatch.Frequency;

    protected static long LimitAfter(long end) => end + (long)(PatienceSeconds * Stopwatch.Frequency);

    protected static int Remaining(long end) =>
        (int)Math.Clamp((end - Stopwatch.GetTimestamp()) * 1000 / Stopwatch.Frequency, 0, 500) + 1;

    protected static BenchException Undelivered() =>
        new($"not everything arrived within {PatienceSeconds} s of the load's end");

    protected void Fail(Flow flow)
    {
        Errors++;
        flow.Busy = false;
        Close(flow);
    }

    protected void Close(Flow flow)
    {
        if (flow.Fd >= 0)
        {
            _ = Libc.close(flow.Fd);
            flow.Fd = -1;
        }
    }

    public void Dispose()
    {
        foreach (Flow flow in Flows)
        {
            Close(flow);
        }
        Poll.Dispose();
    }

    protected sealed class Flow(int key)
    {
        internal readonly int Key = key;
        internal int Fd = -1;
        internal bool Busy;
        internal bool Answered;
        internal int Sent;
        internal int Received;
        internal long Start;
    }
}

/// <summary>Sends as fast as it goes; the backend counts. Units are bytes.</summary>
internal sealed unsafe class BulkUp(int port, int connections, Counters counters)
    : Load(port, connections, counters)
{
    protected override uint FirstEvents => 0;

    internal override Work Run(double seconds)
    {
        long before = Volatile.Read(ref Counters.Received);
        long start = Stopwatch.GetTimestamp();
        long sent = Send(After(seconds));
        long limit = LimitAfter(Stopwatch.GetTimestamp());
        while (Volatile.Read(ref Counters.Received) - before < sent)
        {
            if (Stopwatch.GetTimestamp() > limit)
            {
                throw Undelivered();
            }
            _ = Libc.usleep(300);
        }
        return new Work(sent, Between(start, Counters.LastArrival));
    }

    private long Send(long end)
    {
        Arm(Libc.Out);
        // A single connection is kept full; many share the thread in smaller turns.
        int turn = Flows.Length == 1 ? 16 : Flows.Length <= 16 ? 4 : 2;
        long total = 0;
        while (Stopwatch.GetTimestamp() < end)
        {
            int count = Poll.Wait(Remaining(end));
            for (int i = 0; i < count; i++)
            {
                total += SendTurn(Flows[Poll.Key(i)], turn);
            }
        }
        Arm(0);
        return total;
    }

    private long SendTurn(Flow flow, int turn)
    {
        long total = 0;
        for (int i = 0; i < turn; i++)
        {
            nint sent = Libc.send(flow.Fd, Payload.Data, Payload.Chunk, Libc.DontWait | Libc.NoSignal);
            if (sent < 0 && Libc.Error != Libc.Eagain)
            {
                Fail(flow);
            }
            total += Math.Max(0, sent);
            if (sent < Payload.Chunk)
            {
                break;
            }
        }
        return total;
    }

    private void Arm(uint events)
    {
        foreach (Flow flow in Flows)
        {
            if (flow.Fd >= 0)
            {
                Poll.Change(flow.Fd, events, flow.Key);
            }
        }
    }
}

/// <summary>Receives what the backend sends as fast as it goes. Units are bytes.</summary>
internal sealed unsafe class BulkDown(int port, int connections, Counters counters)
    : Load(port, connections, counters)
{
    protected override uint FirstEvents => Libc.In;

    internal override Work Run(double seconds)
    {
        long sentBefore = Volatile.Read(ref Counters.Sent);
        long stopsBefore = Volatile.Read(ref Counters.Stops);
        long total = 0;
        long start = Stopwatch.GetTimestamp();
        long last = start;
        long end = After(seconds);
        bool stopping = false;
        Command((byte)'G');
        while (true)
        {
            if (!stopping && Stopwatch.GetTimestamp() >= end)
            {
                stopping = true;
                Command((byte)'S');
            }
            if (stopping)
            {
                if (Volatile.Read(ref Counters.Stops) - stopsBefore >= Flows.Length - Errors
                    && Volatile.Read(ref Counters.Sent) - sentBefore == total)
                {
                    return new Work(total, Between(start, last));
                }
                if (Stopwatch.GetTimestamp() > LimitAfter(end))
                {
                    throw Undelivered();
                }
            }
            int count = Poll.Wait(stopping ? 1 : Remaining(end));
            for (int i = 0; i < count; i++)
            {
                total += Receive(Flows[Poll.Key(i)]);
                last = Stopwatch.GetTimestamp();
            }
        }
    }

    private long Receive(Flow flow)
    {
        long total = 0;
        for (int i = 0; i < 4; i++)
        {
            nint received = Libc.recv(flow.Fd, Payload.Scratch, Payload.Most, Libc.DontWait | Libc.Discard);
            if (received == 0 || (received < 0 && Libc.Error != Libc.Eagain))
            {
                Fail(flow);
            }
            if (received <= 0)
            {
                break;
            }
            total += received;
        }
        return total;
    }

    private void Command(byte command)
    {
        foreach (Flow flow in Flows)
        {
            if (flow.Fd >= 0 && Libc.send(flow.Fd, &command, 1, Libc.DontWait | Libc.NoSignal) != 1)
            {
                Fail(flow);
            }
        }
    }
}

/// <summary>Some connections that read as fast as it goes, first alone, then beside many that hardly read. Units are the
/// fast ones' bytes beside the slow ones.</summary>
internal sealed unsafe class Mixed(int port, int fast, int slow, Counters counters)
    : Load(port, fast + slow, counters)
{
    private const int Sip = 4096; // bytes that a slow connection reads at once, ten times a second
    private const double Filling = 1.0; // seconds until the buffers of the slow ones are full, which takes the backend all it has
    private const double Window = 0.4; // seconds
    private int _next = -1;
    private long _sipped;
    private bool _isWarm;

    protected override uint FirstEvents => Libc.In;

    /// <summary>The fast ones' rate beside the slow ones, as a part of their rate alone.</summary>
    internal double Kept { get; private set; }

    internal override Work Run(double seconds)
    {
        foreach (Flow flow in Flows.AsSpan(fast))
        {
            Poll.Change(flow.Fd, 0, flow.Key);
        }
        Command(Flows.AsSpan(0, fast));
        if (!_isWarm)
        {
            _isWarm = true;
            return Receive(seconds, isSipping: false);
        }
        Work alone = Receive(Window, isSipping: false);
        Command(Flows.AsSpan(fast));
        _ = Receive(Filling, isSipping: true);
        Work beside = Receive(Window, isSipping: true);
        Kept = beside.Units / beside.Seconds / (alone.Units / alone.Seconds);
        return beside;
    }

    private Work Receive(double seconds, bool isSipping)
    {
        long total = 0;
        long start = Stopwatch.GetTimestamp();
        long end = After(seconds);
        while (Stopwatch.GetTimestamp() < end)
        {
            int count = Poll.Wait(1);
            for (int i = 0; i < count; i++)
            {
                total += Receive(Flows[Poll.Key(i)], Payload.Most, Libc.Discard);
            }
            if (isSipping)
            {
                SipWhatIsDue();
            }
        }
        return new Work(total, Between(start, Stopwatch.GetTimestamp()));
    }

    /// <summary>One slow connection after the other.</summary>
    private void SipWhatIsDue()
    {
        long now = Stopwatch.GetTimestamp();
        while (now - _sipped > Stopwatch.Frequency / (10 * slow))
        {
            _sipped = Math.Max(_sipped + (Stopwatch.Frequency / (10 * slow)), now - (Stopwatch.Frequency / 10));
            _next = (_next + 1) % slow;
            _ = Receive(Flows[fast + _next], Sip, 0);
        }
    }

    private long Receive(Flow flow, int most, int flags)
    {
        nint received = flow.Fd < 0 ? 0 : Libc.recv(flow.Fd, Payload.Scratch, most, Libc.DontWait | flags);
        if (received == 0 || (received < 0 && Libc.Error != Libc.Eagain))
        {
            Fail(flow);
        }
        return Math.Max(0, received);
    }

    private void Command(Span<Flow> flows)
    {
        byte command = (byte)'G';
        foreach (Flow flow in flows)
        {
            if (Libc.send(flow.Fd, &command, 1, Libc.DontWait | Libc.NoSignal) != 1)
            {
                Fail(flow);
            }
        }
    }
}

/// <summary>On every connection a message, its answer, the next message. Units are requests.</summary>
internal sealed unsafe class PingPong(int port, int connections, Counters counters)
    : Load(port, connections, counters)
{
    private int Size => Counters.MessageSize;

    protected override uint FirstEvents => Libc.In | Libc.Out | Libc.EdgeTriggered;

    internal override Work Run(double seconds)
    {
        Latency.Clear();
        long start = Stopwatch.GetTimestamp();
        long now = start;
        long end = After(seconds);
        long done = 0;
        int busy = 0;
        foreach (Flow flow in Flows)
        {
            busy += flow.Fd >= 0 && Begin(flow) ? 1 : 0;
        }
        while (busy > 0)
        {
            int count = Poll.Wait(100);
            if (count == 0 && Stopwatch.GetTimestamp() > LimitAfter(end))
            {
                throw Undelivered();
            }
            for (int i = 0; i < count; i++)
            {
                Flow flow = Flows[Poll.Key(i)];
                if (!flow.Busy)
                {
                    continue;
                }
                if (!Advance(flow))
                {
                    busy -= flow.Busy ? 0 : 1; // it failed
                    continue;
                }
                now = Stopwatch.GetTimestamp();
                Latency.Add(now - flow.Start);
                done++;
                flow.Busy = false;
                if (now >= end || !Begin(flow))
                {
                    busy--;
                }
            }
        }
        return new Work(done, Between(start, now));
    }

    private bool Begin(Flow flow)
    {
        flow.Sent = 0;
        flow.Received = 0;
        flow.Busy = true;
        flow.Start = Stopwatch.GetTimestamp();
        return Send(flow);
    }

    /// <summary>True when the answer is complete. A flow that failed is closed and no longer busy.</summary>
    private bool Advance(Flow flow)
    {
        if (flow.Sent < Size && !Send(flow))
        {
            return false;
        }
        while (flow.Received < Size)
        {
            nint most = Size - flow.Received;
            nint received = Libc.recv(flow.Fd, Payload.Scratch, most, Libc.DontWait | Libc.Discard);
            if (received <= 0)
            {
                if (received == 0 || Libc.Error != Libc.Eagain)
                {
                    Fail(flow);
                }
                return false;
            }
            flow.Received += (int)received;
        }
        return true;
    }

    private bool Send(Flow flow)
    {
        while (flow.Sent < Size)
        {
            nint most = Size - flow.Sent;
            nint sent = Libc.send(flow.Fd, Payload.Data, most, Libc.DontWait | Libc.NoSignal);
            if (sent < 0)
            {
                if (Libc.Error == Libc.Eagain)
                {
                    return true;
                }
                Fail(flow);
                return false;
            }
            flow.Sent += (int)sent;
        }
        return true;
    }
}

/// <summary>Connect, 64 bytes, 64 back, the backend closes; then the next. Units are connections.</summary>
internal sealed unsafe class ConnectRate(int port, int connections, Counters counters)
    : Load(port, connections, counters)
{
    internal const int Size = 64;
    private const int Sources = 16;
    private int _source;

    protected override uint FirstEvents => Libc.In | Libc.Out | Libc.EdgeTriggered;

    internal override void Open()
    {
    }

    internal override Work Run(double seconds)
    {
        Latency.Clear();
        long start = Stopwatch.GetTimestamp();
        long now = start;
        long end = After(seconds);
        long stuckCheck = After(1);
        long done = 0;
        int busy = Flows.Count(Begin);
        while (busy > 0)
        {
            int count = Poll.Wait(50);
            now = Stopwatch.GetTimestamp();
            for (int i = 0; i < count; i++)
            {
                Flow flow = Flows[Poll.Key(i)];
                if (!flow.Busy || !Advance(flow, Poll.Events(i)))
                {
                    continue;
                }
                done += flow.Answered ? 1 : 0;
                Errors += flow.Answered ? 0 : 1;
                busy -= Next(flow, end) ? 0 : 1;
            }
            if (now > stuckCheck)
            {
                stuckCheck = After(1);
                foreach (Flow flow in Flows.Where(f => f.Busy && Between(f.Start, now) > 3))
                {
                    Errors++;
                    busy -= Next(flow, end) ? 0 : 1;
                }
            }
        }
        _ = Libc.usleep(100_000); // the proxy's own closing work belongs to these connections
        return new Work(done, Between(start, now));
    }

    private bool Next(Flow flow, long end)
    {
        Close(flow);
        flow.Busy = false;
        return Errors < 1000 && Stopwatch.GetTimestamp() < end && Begin(flow);
    }

    private bool Begin(Flow flow)
    {
        flow.Sent = 0;
        flow.Received = 0;
        flow.Answered = false;
        flow.Start = Stopwatch.GetTimestamp();
        flow.Fd = Libc.BeginConnect(Port, _source++ % Sources);
        if (flow.Fd < 0)
        {
            Errors++;
            return false;
        }
        flow.Busy = true;
        _ = Send(flow);
        Poll.Add(flow.Fd, FirstEvents, flow.Key);
        return true;
    }

    /// <summary>True when the connection is over, well or not.</summary>
    private bool Advance(Flow flow, uint events)
    {
        if (!Send(flow))
        {
            return true;
        }
        while ((events & (Libc.In | Libc.Failed)) != 0)
        {
            nint received = Libc.recv(flow.Fd, Payload.Scratch, 4096, Libc.DontWait);
            if (received <= 0)
            {
                return received == 0 || Libc.Error != Libc.Eagain;
            }
            flow.Received += (int)received;
            if (flow.Received >= Size && !flow.Answered)
            {
                flow.Answered = true;
                Latency.Add(Stopwatch.GetTimestamp() - flow.Start);
            }
        }
        return false;
    }

    private static bool Send(Flow flow)
    {
        if (flow.Sent < Size)
        {
            nint most = Size - flow.Sent;
            nint sent = Libc.send(flow.Fd, Payload.Data, most, Libc.DontWait | Libc.NoSignal);
            if (sent < 0 && Libc.Error is not (Libc.Eagain or Libc.Enotconn))
            {
                return false;
            }
            flow.Sent += (int)Math.Max(0, sent);
        }
        return true;
    }
}
