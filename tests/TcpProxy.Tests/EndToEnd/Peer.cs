using System;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>One end of a TCP or unix connection; every operation has a deadline.</summary>
internal sealed class Peer(Socket socket) : IDisposable
{
    private const int Chunk = 256 * 1024;

    public Socket Socket { get; } = socket;

    /// <summary>Our own address, as the proxy's log writes it.</summary>
    public string Local => Socket.LocalEndPoint!.ToString()!;

    /// <summary>
    /// Sends some of the data, as much as there is room for; waits for room as long as it takes.
    /// </summary>
    public async Task<int> SendSome(ReadOnlyMemory<byte> data) => await Socket.SendAsync(data);

    /// <summary>Sends as much as there is room for until the connection ends, or the test.</summary>
    public async Task Push(Action<int>? sent = null)
    {
        byte[] block = new byte[64 * 1024];
        try
        {
            while (true)
            {
                int count = await SendSome(block).ConfigureAwait(false);
                sent?.Invoke(count);
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // that was the end
        }
    }

    public async Task<int> ReceiveSome(Memory<byte> buffer) => await Socket.ReceiveAsync(buffer);

    public static async Task<Peer> Connect(EndPoint to, EndPoint? from = null)
    {
        bool unix = to.AddressFamily == AddressFamily.Unix;
        Socket socket = new(
            to.AddressFamily, SocketType.Stream, unix ? ProtocolType.Unspecified : ProtocolType.Tcp);
        try
        {
            if (from is not null)
            {
                socket.Bind(from);
            }


            // blocking: an asynchronous connect reports a reset that follows at once as its own failure
            await Task.Run(() => socket.Connect(to)).Within($"connect to {to}");
            return new Peer(socket);
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    public Task Send(string text) => Send(Encoding.UTF8.GetBytes(text));

    public Task Send(ReadOnlyMemory<byte> data) => SendCore(data).Within($"sending {data.Length} bytes");

    public async Task Send(Pattern pattern, long length, long offset = 0, double seconds = 120)
    {
        await Core().Within($"sending {length} bytes", seconds);

        async Task Core()
        {
            byte[] buffer = new byte[Chunk];
            for (long at = 0; at < length;)
            {
                int count = (int)Math.Min(Chunk, length - at);
                pattern.Fill(offset + at, buffer.AsSpan(0, count));
                await SendCore(buffer.AsMemory(0, count));
                at += count;
            }
        }
    }

    /// <summary>Receives exactly this many bytes of the pattern and compares each of them.</summary>
    public async Task Receive(Pattern pattern, long length, long offset = 0, double seconds = 120)
    {
        long at = 0;
        try
        {
            await Core().Within("all bytes", seconds);
        }
        catch (TimeoutException)
        {
            throw new TimeoutException($"{Volatile.Read(ref at)} of {length} bytes came within {seconds} s");
        }

        async Task Core()
        {
            byte[] buffer = new byte[Chunk];
            while (at < length)
            {
                int count = await Socket.ReceiveAsync(buffer.AsMemory(0, (int)Math.Min(Chunk, length - at)));
                Assert.True(count > 0, $"the connection ended after {at} of {length} bytes");
                pattern.Check(offset + at, buffer.AsSpan(0, count));
                Volatile.Write(ref at, at + count);
            }
        }
    }

    public async Task<byte[]> Receive(int count)
    {
        byte[] buffer = new byte[count];
        int at = 0;
        await Core().Within($"receiving {count} bytes");
        return buffer;

        async Task Core()
        {
            while (at < count)
            {
                int got = await Socket.ReceiveAsync(buffer.AsMemory(at));
                Assert.True(got > 0, $"the connection ended after {at} of {count} bytes");
                at += got;
            }
        }
    }

    public async Task ReceiveText(string expected) =>
        Assert.Equal(expected, Encoding.UTF8.GetString(await Receive(Encoding.UTF8.GetByteCount(expected))));

    public async Task<string> ReceiveLine()
    {
        StringBuilder line = new();
        for (byte b; (b = (await Receive(1))[0]) != '\n';)
        {
            line.Append((char)b);
        }

        return line.ToString();
    }

    /// <summary>All that comes until the other side finishes.</summary>
    public async Task<byte[]> ReceiveToEnd(double seconds = 30)
    {
        (byte[] data, SocketError error) = await Drain(seconds);
        Assert.Equal(SocketError.Success, error);
        return data;
    }

    /// <summary>The other side has finished, and sent nothing more before.</summary>
    public async Task ExpectEnd(double seconds = 20) => Assert.Empty(await ReceiveToEnd(seconds));

    /// <summary>The connection is reset, not ended; what came before does not matter.</summary>
    public async Task ExpectReset(double seconds = 20) =>
        Assert.Equal(SocketError.ConnectionReset, (await Drain(seconds)).Error);

    /// <summary>Where the end has already been read: the connection is reset nevertheless.</summary>
    public Task ExpectBroken() =>
        Wait.Until(() => Socket.Poll(0, SelectMode.SelectError), "a reset after the end");

    /// <summary>Reads on until the end: what came, and Success for FIN or the error.</summary>
    public async Task<(byte[] Data, SocketError Error)> Drain(double seconds = 20)
    {
        MemoryStream data = new();
        SocketError error = await Core().Within("the end of the connection", seconds);
        return (data.ToArray(), error);

        async Task<SocketError> Core()
        {
            byte[] buffer = new byte[Chunk];
            try
            {
                for (int count; (count = await Socket.ReceiveAsync(buffer.AsMemory())) > 0;)
                {
                    data.Write(buffer, 0, count);
                }

                return SocketError.Success;
            }
            catch (SocketException e)
            {
                return e.SocketErrorCode;
            }
        }
    }

    /// <summary>One message there and back.</summary>
    public async Task Ask(string question)
    {
        await Send(question);
        await ReceiveText(question);
    }

    /// <summary>Sends FIN; receiving goes on.</summary>
    public void Finish() => Socket.Shutdown(SocketShutdown.Send);

    /// <summary>Sends RST.</summary>
    public void Reset()
    {
        Socket.LingerState = new LingerOption(true, 0);
        Socket.Dispose();
    }

    public void Dispose() => Socket.Dispose();

    private async Task SendCore(ReadOnlyMemory<byte> data)
    {
        while (data.Length > 0)
        {
            data = data[await Socket.SendAsync(data)..];
        }
    }
}

/// <summary>
/// An endless stream of bytes of which each can be foretold from its position: no swap or repeat goes
/// unseen.
/// </summary>
internal sealed class Pattern(int seed)
{
    private readonly ulong _seed = (ulong)seed * 0xD1342543DE82EF95;

    public void Fill(long offset, Span<byte> destination)
    {
        while (destination.Length > 0)
        {
            int into = (int)(offset & 7);
            if (into == 0 && destination.Length >= 8)
            {
                Span<ulong> words = MemoryMarshal.Cast<byte, ulong>(destination);
                ulong index = (ulong)offset >> 3;
                for (int i = 0; i < words.Length; i++)
                {
                    words[i] = Word(index + (ulong)i);
                }

                offset += words.Length * 8;
                destination = destination[(words.Length * 8)..];
                continue;
            }

            ulong word = Word((ulong)offset >> 3) >> (8 * into);
            for (; into < 8 && destination.Length > 0; into++, offset++, word >>= 8)
            {
                destination[0] = (byte)word;
                destination = destination[1..];
            }
        }
    }

    public void Check(long offset, ReadOnlySpan<byte> data)
    {
        Span<byte> expected = stackalloc byte[8192];
        while (data.Length > 0)
        {
            int count = Math.Min(expected.Length, data.Length);
            Fill(offset, expected[..count]);
            int same = data[..count].CommonPrefixLength(expected[..count]);
            Assert.True(same == count, $"seed {seed}: byte {offset + same} is wrong");
            offset += count;
            data = data[count..];
        }
    }

    private ulong Word(ulong index)
    {
        ulong z = _seed + (index * 0x9E3779B97F4A7C15);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
}
