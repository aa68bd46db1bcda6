using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>
/// The base of every black-box test: what the test starts through <see cref="Given"/> ends with it.
/// </summary>
public abstract class EndToEndTest : IAsyncLifetime
{
    protected const int Quick = 60_000;
    protected const int Slow = 240_000;

    internal Given Given { get; } = new();

    /// <summary>Why none of the tests can be run without libc; null where they can.</summary>
    protected virtual string? Native => null;

    public ValueTask InitializeAsync()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "looks at the proxy through /proc and sends signals");
        if (Native is { } reason)
        {
            Tool.NeedLibc(reason);
        }

        return ValueTask.CompletedTask;
    }

    public async ValueTask DisposeAsync()
    {
        await Given.DisposeAsync();
        GC.SuppressFinalize(this);
    }
}

/// <summary>Tests that fill the machine: one at a time, and nothing beside them.</summary>
[CollectionDefinition("heavy", DisableParallelization = true)]
public sealed class HeavyTests;

/// <summary>
/// Starts proxies, servers and clients on free loopback ports and closes them all at the end of the test.
/// </summary>
internal sealed class Given : IAsyncDisposable
{
    private readonly List<ProxyProcess> _proxies = [];
    private readonly List<Upstream> _servers = [];
    private readonly List<Peer> _clients = [];
    private readonly List<Func<Task>> _others = [];
    private string? _folder;

    /// <summary>A temporary folder of this test's own.</summary>
    public string Folder => _folder ??= Directory.CreateTempSubdirectory("tcpproxy-e2e-").FullName;

    public string Path(string name) => System.IO.Path.Combine(Folder, name);

    public string Write(string name, string text)
    {
        File.WriteAllText(Path(name), text);
        return Path(name);
    }

    public Task<ProxyProcess> Proxy(params string[] arguments) => Proxy(new Launch(), arguments);

    public async Task<ProxyProcess> Proxy(Launch launch, params string[] arguments)
    {
        ProxyProcess proxy = new(
            launch, Directory.CreateDirectory(Path($"proxy{_proxies.Count}")).FullName, arguments);
        _proxies.Add(proxy);
        if (launch.AwaitReady)
        {
            await proxy.Ready();
        }

        return proxy;
    }

    /// <summary>
    /// A server whose connections the test takes by hand with <see cref="Upstream.Accept"/>.
    /// </summary>
    public Upstream Server(EndPoint? at = null, int backlog = 512) => Server(null, at, backlog);

    /// <summary>A server that runs <paramref name="serve"/> for each connection.</summary>
    public Upstream Server(Func<Peer, Task>? serve, EndPoint? at = null, int backlog = 4096)
    {
        Upstream server = new(at ?? new IPEndPoint(IPAddress.Loopback, 0), serve, backlog);
        _servers.Add(server);
        return server;
    }

    public Upstream Echo(EndPoint? at = null) => Server(Upstream.EchoAsync, at);

    /// <summary>
    /// A server that greets every client with one line that tells it from the others, then echoes.
    /// </summary>
    public Upstream Named(string name, EndPoint? at = null) => Server(
        async peer =>
        {
            await peer.Send($"{name}\n");
            await Upstream.EchoAsync(peer);
        },
        at);

    public async Task<Peer> Client(EndPoint to, EndPoint? from = null) =>
        Client(await Peer.Connect(to, from));

    /// <summary>A connection that the test has made itself.</summary>
    public Peer Client(Peer peer)
    {
        lock (_clients)
        {
            _clients.Add(peer);
        }

        return peer;
    }

    public Task<Peer> Client(ProxyProcess proxy, int listen = 0) => Client(proxy.Endpoint(listen));

    /// <summary>Both ends of one connection through the proxy.</summary>
    public async Task<(Peer Client, Peer Server)> Bridge(
        ProxyProcess proxy, Upstream upstream, int listen = 0)
    {
        Task<Peer> accepted = upstream.Accept();
        Peer client = await Client(proxy, listen);
        return (client, await accepted);
    }

    /// <summary>A loopback address that accepts nothing and refuses nothing: its queue is full.</summary>
    public async Task<Upstream> Silent(IPAddress? address = null, int port = 0)
    {
        Upstream server = Server(new IPEndPoint(address ?? IPAddress.Loopback, port), backlog: 0);
        for (int i = 0; ; i++)
        {
            Assert.True(i < 16, "the queue of the silent server does not fill");
            Socket filler = new(server.Endpoint.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
            Owned(filler);
            Task connect = filler.ConnectAsync(server.Endpoint);
            if (await Task.WhenAny(connect, Task.Delay(300)) != connect)
            {
                _ = connect.ContinueWith(t => t.Exception, TaskScheduler.Default);
                return server;
            }
        }
    }

    /// <summary>A port on which nothing listens and which nobody else gets while the test runs.</summary>
    public int RefusingPort(IPAddress? address = null)
    {
        address ??= IPAddress.Loopback;
        Socket bound = new(address.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        Owned(bound);
        bound.Bind(new IPEndPoint(address, 0));
        return ((IPEndPoint)bound.LocalEndPoint!).Port;
    }

    /// <summary>
    /// The first of <paramref name="count"/> consecutive free ports, below those that the system hands out.
    /// </summary>
    public static int FreePorts(int count)
    {
        while (true)
        {
            int first = Random.Shared.Next(12_000, 30_000);
            try
            {
                for (int i = 0; i < count; i++)
                {
                    using Socket probe = new(
                        AddressFamily.InterNetworkV6, SocketType.Stream, ProtocolType.Tcp);
                    probe.DualMode = true;
                    probe.ExclusiveAddressUse = true;
                    probe.Bind(new IPEndPoint(IPAddress.IPv6Any, first + i));
                }

                return first;
            }
            catch (SocketException)
            {
                continue;
            }
        }
    }

    public T Owned<T>(T owned)
        where T : IDisposable
    {
        _others.Add(() =>
        {
            owned.Dispose();
            return Task.CompletedTask;
        });
        return owned;
    }

    public void AtEnd(Func<Task> action) => _others.Add(action);

    public async ValueTask DisposeAsync()
    {
        bool failed = TestContext.Current.TestState?.Result == TestResult.Failed;
        List<Exception> errors = [];
        lock (_clients)
        {
            _clients.ForEach(c => c.Dispose());
        }

        _servers.ForEach(s => s.Dispose());
        foreach (ProxyProcess proxy in _proxies)
        {
            try
            {
                await proxy.End(failed);
            }
            catch (Exception e)
            {
                errors.Add(e);
            }
        }

        foreach (Func<Task> other in Enumerable.Reverse(_others))
        {
            await other();
        }

        errors.AddRange(_servers.Select(s => s.Error).OfType<Exception>());
        if (_folder is not null)
        {
            Directory.Delete(_folder, recursive: true);
        }

        if (errors.Count > 0)
        {
            throw errors.Count == 1 ? errors[0] : new AggregateException(errors);
        }
    }
}

/// <summary>Waiting for what cannot announce itself, never longer than the given time.</summary>
internal static class Wait
{
    public static async Task Until(Func<bool> holds, string what, double seconds = 20)
    {
        long start = Environment.TickCount64;
        while (!holds())
        {
            TestContext.Current.CancellationToken.ThrowIfCancellationRequested();
            if (Environment.TickCount64 - start > seconds * 1000)
            {
                throw new TimeoutException($"not within {seconds} s: {what}");
            }

            await Task.Delay(10);
        }
    }

    /// <summary>Until a count that has begun to grow has not grown for half a second.</summary>
    public static async Task<long> UntilStill(Func<long> count, string what, double seconds = 20)
    {
        long start = Environment.TickCount64;
        long last;
        do
        {
            Assert.True(Environment.TickCount64 - start < seconds * 1000, $"not still within {seconds} s: {what}");
            last = count();
            await Pause(500);
        }
        while (last == 0 || last != count());

        return last;
    }

    /// <summary>
    /// Lets time pass where time itself is what a test is about, or asks again in a moment.
    /// </summary>
    public static Task Pause(int milliseconds) =>
        Task.Delay(milliseconds, TestContext.Current.CancellationToken);

    /// <summary>Does something on a thread of its own choosing, beside the test.</summary>
    public static Task Apart(Func<Task> action) => Task.Run(action, TestContext.Current.CancellationToken);

    public static Task<T> Apart<T>(Func<Task<T>> action) =>
        Task.Run(action, TestContext.Current.CancellationToken);

    /// <summary>Does something so many times, some of them at once.</summary>
    public static Task Many(int count, int atOnce, Func<int, Task> action) => Parallel.ForAsync(
        0,
        count,
        new ParallelOptions
        {
            MaxDegreeOfParallelism = atOnce,
            CancellationToken = TestContext.Current.CancellationToken,
        },
        async (i, _) => await action(i));

    public static async Task<T> Within<T>(this Task<T> task, string what, double seconds = 20)
    {
        try
        {
            return await task.WaitAsync(TimeSpan.FromSeconds(seconds), TestContext.Current.CancellationToken);
        }
        catch (TimeoutException)
        {
            throw new TimeoutException($"not within {seconds} s: {what}");
        }
    }

    public static async Task Within(this Task task, string what, double seconds = 20)
    {
        try
        {
            await task.WaitAsync(TimeSpan.FromSeconds(seconds), TestContext.Current.CancellationToken);
        }
        catch (TimeoutException)
        {
            throw new TimeoutException($"not within {seconds} s: {what}");
        }
    }
}
