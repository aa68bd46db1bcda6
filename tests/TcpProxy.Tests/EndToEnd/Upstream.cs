using System;
using System.Collections.Generic;
using System.Net;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Channels;
using System.Threading.Tasks;

namespace TcpProxy.Tests;

/// <summary>A server behind the proxy, well or ill behaved as its <c>serve</c> function is.</summary>
internal sealed class Upstream : IDisposable
{
    private readonly Socket _socket;
    private readonly Func<Peer, Task>? _serve;
    private readonly Channel<Peer> _waiting = Channel.CreateUnbounded<Peer>();
    private readonly List<Peer> _peers = [];
    private readonly CancellationTokenSource _stopping = new();
    private volatile bool _closing;
    private volatile bool _isRefusing;
    private int _accepted;

    public Upstream(EndPoint at, Func<Peer, Task>? serve, int backlog)
    {
        bool unix = at.AddressFamily == AddressFamily.Unix;
        _socket = new Socket(
            at.AddressFamily, SocketType.Stream, unix ? ProtocolType.Unspecified : ProtocolType.Tcp);
        _serve = serve;
        _socket.Bind(at);
        _socket.Listen(backlog);
        Endpoint = unix ? at : _socket.LocalEndPoint!;
        if (backlog > 0)
        {
            _ = AcceptAsync();
        }
    }

    public EndPoint Endpoint { get; }

    public bool IsRefusing => _isRefusing;

    public int Port => ((IPEndPoint)Endpoint).Port;

    /// <summary>The address as the command line wants it.</summary>
    public string Address => Endpoint is UnixDomainSocketEndPoint ? $"unix:{Endpoint}" : Endpoint.ToString()!;

    /// <summary>How many connections have come.</summary>
    public int Accepted => Volatile.Read(ref _accepted);

    /// <summary>What a serve function threw while the test was running.</summary>
    public Exception? Error { get; private set; }

    public static async Task EchoAsync(Peer peer)
    {
        byte[] buffer = new byte[64 * 1024];
        for (int count; (count = await peer.Socket.ReceiveAsync(buffer.AsMemory())) > 0;)
        {
            for (int at = 0; at < count;)
            {
                at += await peer.Socket.SendAsync(buffer.AsMemory(at, count - at));
            }
        }

        peer.Dispose();
    }

    public Task<Peer> Accept(double seconds = 20) =>
        _waiting.Reader.ReadAsync().AsTask().Within($"a connection at {Endpoint}", seconds);

    /// <summary>No longer listens; the connections that it has go on.</summary>
    public void Refuse()
    {
        _isRefusing = true;
        _stopping.Cancel(); // an accept that pends while its socket is closed closes whom it has just taken
        _socket.Dispose();
    }

    public void Dispose()
    {
        _closing = true;
        _socket.Dispose();
        _stopping.Dispose();
        lock (_peers)
        {
            _peers.ForEach(p => p.Dispose());
        }
    }

    private async Task AcceptAsync()
    {
        try
        {
            while (true)
            {
                Take(new Peer(await _socket.AcceptAsync(_stopping.Token)));
            }
        }
        catch (Exception e) when (e is ObjectDisposedException or OperationCanceledException || (e is SocketException && (_closing || _isRefusing)))
        {
            _waiting.Writer.TryComplete();
        }
    }

    private void Take(Peer peer)
    {
        lock (_peers)
        {
            _peers.Add(peer);
            if (_closing)
            {
                peer.Dispose();
            }
        }

        Interlocked.Increment(ref _accepted);
        _ = ServeAsync(peer);
    }

    private async Task ServeAsync(Peer peer)
    {
        if (_serve is null)
        {
            _waiting.Writer.TryWrite(peer);
            return;
        }

        try
        {
            await Task.Yield();
            await _serve(peer);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException || _closing)
        {
            peer.Dispose();
        }
        catch (Exception e)
        {
            Error ??= e;
        }
        finally
        {
            if (!_closing && peer.Socket.SafeHandle.IsClosed)
            {
                lock (_peers)
                {
                    _peers.Remove(peer);
                }
            }
        }
    }
}
