using System;
using System.Buffers.Binary;
using System.Linq;
using System.Runtime.InteropServices;

[assembly: DefaultDllImportSearchPaths(DllImportSearchPath.SafeDirectories)]

namespace TcpProxy.Bench;

/// <summary>
/// The Linux calls under the load generator, the backend and the process measurements. Sockets are plain
/// descriptors here: the load must cost less than the proxy that it drives, and MSG_TRUNC (count what
/// arrived, copy nothing) has no counterpart in the BCL.
/// </summary>
internal static unsafe partial class Libc
{
    internal const int Eagain = 11;
    internal const int Einprogress = 115;
    internal const int Enotconn = 107;

    internal const int DontWait = 0x40;
    internal const int NoSignal = 0x4000;
    internal const int Discard = 0x20;

    internal const uint In = 0x1;
    internal const uint Out = 0x4;
    internal const uint Failed = 0x8 | 0x10;
    internal const uint EdgeTriggered = 1u << 31;

    internal const int SigTerm = 15;
    internal const int SigKill = 9;

    private const int Inet = 2;
    private const int Stream = 1;
    private const int NonBlocking = 0x800;
    private const int CloseOnExec = 0x80000;
    private const int SolSocket = 1;
    private const int ReuseAddress = 2;
    private const int ReceiveTimeout = 20;
    private const int SendTimeout = 21;
    private const int IpProtocol = 0;
    private const int BindAddressNoPort = 24;
    private const int TcpProtocol = 6;
    private const int NoDelay = 1;

    internal static int Error => Marshal.GetLastPInvokeError();

    // -- sockets -----------------------------------------------------------------------------------------

    /// <summary>A connected socket that blocks for a bounded time in each call; or -1.</summary>
    internal static int Connect(int port, int timeoutSeconds)
    {
        int fd = Check(socket(Inet, Stream | CloseOnExec, 0), "socket");
        long* time = stackalloc long[2] { timeoutSeconds, 0 };
        _ = setsockopt(fd, SolSocket, ReceiveTimeout, time, 16);
        _ = setsockopt(fd, SolSocket, SendTimeout, time, 16);
        SetNoDelay(fd);
        Address to = Loopback(port, 0x7F000001);
        if (connect(fd, &to, sizeof(Address)) == 0)
        {
            return fd;
        }
        int error = Error;
        _ = close(fd);
        Marshal.SetLastPInvokeError(error);
        return -1;
    }

    /// <summary>Begins a connection from 127.0.1.x, so that one address's ports do not run out.</summary>
    internal static int BeginConnect(int port, int source)
    {
        int fd = Check(socket(Inet, Stream | CloseOnExec | NonBlocking, 0), "socket");
        SetNoDelay(fd);
        int one = 1;
        _ = setsockopt(fd, IpProtocol, BindAddressNoPort, &one, sizeof(int));
        Address from = Loopback(0, 0x7F000101u + (uint)source);
        Address to = Loopback(port, 0x7F000001);
        if (bind(fd, &from, sizeof(Address)) == 0
            && (connect(fd, &to, sizeof(Address)) == 0 || Error == Einprogress))
        {
            return fd;
        }
        _ = close(fd);
        return -1;
    }

    /// <summary>A listener on 127.0.0.1, or -1 when the port is taken.</summary>
    internal static int Listen(int port)
    {
        int fd = Check(socket(Inet, Stream | CloseOnExec | NonBlocking, 0), "socket");
        int one = 1;
        _ = setsockopt(fd, SolSocket, ReuseAddress, &one, sizeof(int));
        Address at = Loopback(port, 0x7F000001);
        if (bind(fd, &at, sizeof(Address)) == 0 && listen(fd, 4096) == 0)
        {
            return fd;
        }
        _ = close(fd);
        return -1;
    }

    internal static int Accept(int fd)
    {
        int accepted = accept4(fd, null, null, NonBlocking | CloseOnExec);
        if (accepted >= 0)
        {
            SetNoDelay(accepted);
        }
        return accepted;
    }

    private static void SetNoDelay(int fd)
    {
        int one = 1;
        _ = setsockopt(fd, TcpProtocol, NoDelay, &one, sizeof(int));
    }

    private static Address Loopback(int port, uint address) => new()
    {
        Family = Inet,
        Port = BinaryPrimitives.ReverseEndianness((ushort)port),
        Ip = BinaryPrimitives.ReverseEndianness(address),
    };

    [StructLayout(LayoutKind.Sequential)]
    internal struct Address
    {
        internal ushort Family;
        internal ushort Port;
        internal uint Ip;
        internal ulong Zero;
    }

    internal static int Check(int result, string what) =>
        result >= 0 ? result : throw new BenchException($"{what}: {Marshal.GetPInvokeErrorMessage(Error)}");

    // -- descriptors, CPUs, names ------------------------------------------------------------------------

    /// <summary>Raises the soft descriptor limit to the hard one; programs started inherit it.</summary>
    internal static int RaiseDescriptorLimit()
    {
        ulong* limit = stackalloc ulong[2];
        Check(getrlimit(7, limit), "getrlimit");
        limit[0] = limit[1];
        _ = setrlimit(7, limit);
        return (int)Math.Min(limit[1], 1_000_000);
    }

    internal static int[] AllowedCpus()
    {
        byte* mask = stackalloc byte[128];
        new Span<byte>(mask, 128).Clear();
        Check(sched_getaffinity(0, 128, mask), "sched_getaffinity");
        return [.. Enumerable.Range(0, 1024).Where(cpu => (mask[cpu / 8] & (1 << (cpu % 8))) != 0)];
    }

    /// <summary>Binds a thread (0: the calling one) to CPUs; what it starts inherits them.</summary>
    internal static void SetAffinity(int thread, int[] cpus)
    {
        byte* mask = stackalloc byte[128];
        new Span<byte>(mask, 128).Clear();
        foreach (int cpu in cpus)
        {
            mask[cpu / 8] |= (byte)(1 << (cpu % 8));
        }
        _ = sched_setaffinity(thread, 128, mask);
    }

    /// <summary>
    /// Gives the calling thread, and the threads and programs it starts, a network of their own: no port
    /// is taken, no limit shared, and the congestion control is the same everywhere. Needs root.
    /// </summary>
    internal static bool EnterOwnNetwork()
    {
        const int NewNetwork = 0x40000000;
        const ulong SetInterfaceFlags = 0x8914;
        if (unshare(NewNetwork) != 0)
        {
            return false;
        }
        int fd = Check(socket(Inet, 2 | CloseOnExec, 0), "socket");
        byte* request = stackalloc byte[40];
        new Span<byte>(request, 40).Clear();
        "lo"u8.CopyTo(new Span<byte>(request, 16));
        *(short*)(request + 16) = 0x41; // up, running
        int result = ioctl(fd, SetInterfaceFlags, request);
        _ = close(fd);
        return Check(result, "loopback interface") == 0;
    }

    /// <summary>Nanoseconds of CPU a process has used; negative when it is gone.</summary>
    internal static long CpuNanoseconds(int processId)
    {
        long* time = stackalloc long[2];
        int clock = processId == 0 ? 2 : (~processId << 3) | 2;
        return clock_gettime(clock, time) == 0 ? (time[0] * 1_000_000_000) + time[1] : -1;
    }

    // -- starting programs -------------------------------------------------------------------------------

    /// <summary>
    /// Starts a program as the leader of a session of its own, so that it and all that it starts can be
    /// counted and ended by that one id. Process.Start can neither do that nor send the output to a file.
    /// </summary>
    internal static int Spawn(string[] arguments, string output, int input = -1)
    {
        const short SetSignalDefaults = 0x04, SetSignalMask = 0x08, SetSession = 0x80;
        const int WriteCreateAppend = 0x1 | 0x40 | 0x400;
        byte* actions = stackalloc byte[512];
        byte* attributes = stackalloc byte[1024];
        byte* signals = stackalloc byte[256];
        string[] environment = [.. new[] { "PATH", "HOME", "LANG", "TZ" }
            .Select(name => (name, value: Environment.GetEnvironmentVariable(name)))
            .Where(pair => pair.value is not null)
            .Select(pair => $"{pair.name}={pair.value}")];
        byte** argv = Strings(arguments);
        byte** envp = Strings(environment);
        _ = posix_spawn_file_actions_init(actions);
        _ = posix_spawnattr_init(attributes);
        try
        {
            _ = input >= 0
                ? posix_spawn_file_actions_adddup2(actions, input, 0)
                : posix_spawn_file_actions_addopen(actions, 0, "/dev/null", 0, 0);
            _ = posix_spawn_file_actions_addopen(actions, 1, output, WriteCreateAppend, 0x180);
            _ = posix_spawn_file_actions_adddup2(actions, 1, 2);
            _ = posix_spawnattr_setflags(attributes, SetSignalDefaults | SetSignalMask | SetSession);
            _ = sigfillset(signals); // the runtime ignores SIGPIPE, and its children would inherit that
            _ = posix_spawnattr_setsigdefault(attributes, signals);
            _ = sigemptyset(signals);
            _ = posix_spawnattr_setsigmask(attributes, signals);
            int processId;
            int error = posix_spawn(&processId, arguments[0], actions, attributes, argv, envp);
            return error == 0
                ? processId
                : throw new BenchException($"{arguments[0]}: {Marshal.GetPInvokeErrorMessage(error)}");
        }
        finally
        {
            _ = posix_spawn_file_actions_destroy(actions);
            _ = posix_spawnattr_destroy(attributes);
            Free(argv);
            Free(envp);
        }
    }

    /// <summary>Reaps a child; true when it has ended.</summary>
    internal static bool Reap(int processId, bool wait)
    {
        int status;
        return waitpid(processId, &status, wait ? 0 : 1) != 0;
    }

    private static byte** Strings(string[] texts)
    {
        byte** list = (byte**)NativeMemory.AllocZeroed((nuint)texts.Length + 1, (nuint)sizeof(byte*));
        for (int i = 0; i < texts.Length; i++)
        {
            list[i] = (byte*)Marshal.StringToCoTaskMemUTF8(texts[i]);
        }
        return list;
    }

    private static void Free(byte** list)
    {
        for (byte** item = list; *item != null; item++)
        {
            Marshal.FreeCoTaskMem((nint)(*item));
        }
        NativeMemory.Free(list);
    }

    // -- the calls themselves ----------------------------------------------------------------------------

    [LibraryImport("libc", SetLastError = true)]
    private static partial int socket(int domain, int type, int protocol);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int setsockopt(int fd, int level, int name, void* value, int length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int bind(int fd, Address* address, int length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int listen(int fd, int backlog);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int connect(int fd, Address* address, int length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int accept4(int fd, void* address, void* length, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint send(int fd, void* data, nint length, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint recv(int fd, void* data, nint length, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial nint write(int fd, void* data, nint length);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int close(int fd);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int pipe2(int* ends, int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int epoll_create1(int flags);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int epoll_ctl(int poll, int operation, int fd, void* @event);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int epoll_wait(int poll, void* events, int count, int milliseconds);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int getrlimit(int resource, ulong* limit);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int setrlimit(int resource, ulong* limit);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int sched_getaffinity(int thread, nint length, byte* mask);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int sched_setaffinity(int thread, nint length, byte* mask);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int unshare(int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ioctl(int fd, ulong request, void* argument);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int clock_gettime(int clock, long* time);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int usleep(uint microseconds);

    [LibraryImport("libc", SetLastError = true)]
    internal static partial int kill(int processId, int signal);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int waitpid(int processId, int* status, int options);

    [LibraryImport("libc")]
    internal static partial uint geteuid();

    [LibraryImport("libc")]
    private static partial int sigfillset(byte* set);

    [LibraryImport("libc")]
    private static partial int sigemptyset(byte* set);

    [LibraryImport("libc", StringMarshalling = StringMarshalling.Utf8)]
    private static partial int posix_spawn(
        int* processId, string path, byte* actions, byte* attributes, byte** argv, byte** envp);

    [LibraryImport("libc")]
    private static partial int posix_spawn_file_actions_init(byte* actions);

    [LibraryImport("libc")]
    private static partial int posix_spawn_file_actions_destroy(byte* actions);

    [LibraryImport("libc")]
    private static partial int posix_spawn_file_actions_adddup2(byte* actions, int from, int to);

    [LibraryImport("libc", StringMarshalling = StringMarshalling.Utf8)]
    private static partial int posix_spawn_file_actions_addopen(
        byte* actions, int fd, string path, int flags, uint mode);

    [LibraryImport("libc")]
    private static partial int posix_spawnattr_init(byte* attributes);

    [LibraryImport("libc")]
    private static partial int posix_spawnattr_destroy(byte* attributes);

    [LibraryImport("libc")]
    private static partial int posix_spawnattr_setflags(byte* attributes, short flags);

    [LibraryImport("libc")]
    private static partial int posix_spawnattr_setsigdefault(byte* attributes, byte* signals);

    [LibraryImport("libc")]
    private static partial int posix_spawnattr_setsigmask(byte* attributes, byte* signals);
}
