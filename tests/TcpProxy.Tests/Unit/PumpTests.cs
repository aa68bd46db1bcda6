using System;
using System.Collections.Generic;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class PumpTests
{
    [Fact]
    public void A_receive_that_waits_gives_its_array_back_and_the_loop_rents_another()
    {
        using ReceiveBuffer buffer = new();
        Memory<byte> memory = buffer.ForReceive(4096);
        Assert.Equal(4096, memory.Length);
        memory.Span[0] = 1; // the runtime's first attempt
        buffer.GiveBackWhileWaiting();
        OnAnotherThread(() => memory.Span[0] = 2); // the event loop's
        Assert.Equal(2, buffer.Received(1).Span[0]);
    }

    [Fact]
    public void A_loop_that_has_begun_keeps_the_array()
    {
        using ReceiveBuffer buffer = new();
        Memory<byte> memory = buffer.ForReceive(10);
        Assert.Equal(10, memory.Length);
        memory.Span[0] = 1;
        OnAnotherThread(() => memory.Span[0] = 2); // before ReceiveAsync has returned to the owner
        buffer.GiveBackWhileWaiting();
        Assert.Equal(2, buffer.Received(1).Span[0]);
    }

    [Fact]
    public void Without_a_first_attempt_the_loop_finds_an_array_as_well()
    {
        using ReceiveBuffer buffer = new();
        Memory<byte> memory = buffer.ForReceive(4096);
        buffer.GiveBackWhileWaiting();
        OnAnotherThread(() => memory.Span[7] = 7);
        Assert.Equal(7, buffer.Received(8).Span[7]);
    }

    [Fact]
    public async Task Owner_and_loop_never_share_an_array_with_a_stranger()
    {
        // Many owners and one loop race for the hand-over; were an array given back while the loop writes into it,
        // another owner would rent it and see the mark of a stranger.
        const int Rounds = 20_000;
        ReceiveBuffer[] buffers = [.. Enumerable.Range(0, 4).Select(_ => new ReceiveBuffer())];
        for (int round = 0; round < Rounds; round++)
        {
            Memory<byte>[] memories = [.. buffers.Select(buffer => buffer.ForReceive(256))];
            foreach (Memory<byte> memory in memories)
            {
                _ = memory.Span.Length;
            }

            Task loop = Task.Run(() =>
            {
                for (byte i = 0; i < memories.Length; i++)
                {
                    memories[i].Span.Fill(i);
                }
            }, TestContext.Current.CancellationToken);
            Array.ForEach(buffers, buffer => buffer.GiveBackWhileWaiting());
            await loop;
            for (byte i = 0; i < buffers.Length; i++)
            {
                Assert.Equal(-1, buffers[i].Received(256).Span.IndexOfAnyExcept(i));
            }
        }

        Array.ForEach(buffers, buffer => buffer.GiveBack());
    }

    [Fact(Timeout = 30_000)]
    public async Task A_pipe_that_was_left_with_bytes_in_it_gives_them_to_nobody_else()
    {
        Tool.NeedLibc("splice");
        (Socket first, Socket firstFar) = await PairAsync();
        (Socket second, Socket secondFar) = await PairAsync();
        (Socket target, Socket targetFar) = await PairAsync();
        await firstFar.SendAsync("secret"u8.ToArray().AsMemory(), TestContext.Current.CancellationToken);
        await secondFar.SendAsync("mine"u8.ToArray().AsMemory(), TestContext.Current.CancellationToken);
        using (ManualResetEventSlim done = new())
        {
            OnAnotherThread(() =>
            {
                Assert.True(first.Poll(10_000_000, SelectMode.SelectRead));
                Assert.True(second.Poll(10_000_000, SelectMode.SelectRead));
                Assert.Equal(6, Pipe.OfThread()!.Fill(first, 100));
                Socket closed = new(SocketType.Stream, ProtocolType.Tcp);
                closed.Dispose();
                Assert.Throws<ObjectDisposedException>(() => Pipe.OfThread()!.Fill(closed, 100));
                Assert.Equal(4, Pipe.OfThread()!.Fill(second, 100));
            });
            OnAnotherThread(() =>
            {
                Pipe pipe = Pipe.OfThread()!;
                Assert.Equal(Pipe.NothingYet, pipe.Fill(first, 100)); // its bytes went with the other thread's pipe
                secondFar.Send("yours"u8);
                Assert.True(second.Poll(10_000_000, SelectMode.SelectRead));
                Assert.Equal(5, pipe.Fill(second, 100));
                Assert.Equal(0, pipe.Empty(target));
                done.Set();
            });
            Assert.True(done.IsSet);
        }

        byte[] got = new byte[100];
        int length = await targetFar.ReceiveAsync(got.AsMemory(), TestContext.Current.CancellationToken);
        Assert.Equal("yours"u8.ToArray(), got[..length]);
        foreach (Socket socket in new[] { first, firstFar, second, secondFar, target, targetFar })
        {
            socket.Dispose();
        }
    }

    [Fact(Timeout = 30_000)]
    public async Task A_bridge_relays_both_ways_counts_and_ends_with_the_second_FIN()
    {
        (Socket client, Socket accepted) = await PairAsync();
        (Socket dialled, Socket server) = await PairAsync();
        BridgeSettings settings = new() { BufferSize = 1000 };
        PlainBridge bridge = new(accepted, dialled, settings);
        bridge.Start();
        byte[] up = Bytes(50_000);
        byte[] down = Bytes(70_000);
        Task<byte[]> received = ReceiveAllAsync(server);
        await client.SendAsync(up, SocketFlags.None);
        client.Shutdown(SocketShutdown.Send);
        Assert.Equal(up, await received);
        Assert.False(bridge.End.IsCompleted);
        await server.SendAsync(down, SocketFlags.None);
        server.Shutdown(SocketShutdown.Send);
        Assert.Equal(down, await ReceiveAllAsync(client));
        Assert.Same(CloseReason.Done, await bridge.End);
        Assert.Equal((50_000, 70_000), (bridge.BytesUp, bridge.BytesDown));
        Assert.Throws<ObjectDisposedException>(() => accepted.Available);
        Assert.Throws<ObjectDisposedException>(() => dialled.Available);
        client.Dispose();
        server.Dispose();
    }

    [Fact(Timeout = 30_000)]
    public async Task The_first_cause_is_the_reason()
    {
        (Socket client, Socket accepted) = await PairAsync();
        (Socket dialled, Socket server) = await PairAsync();
        PlainBridge bridge = new(accepted, dialled, new BridgeSettings { BufferSize = 1000 });
        bridge.Start();
        server.Close(0);
        Assert.Same(CloseReason.UpstreamReset, await bridge.End);
        SocketException e = await Assert.ThrowsAsync<SocketException>(
            async () => await client.ReceiveAsync(new byte[1].AsMemory(), TestContext.Current.CancellationToken));
        Assert.Equal(SocketError.ConnectionReset, e.SocketErrorCode);
        client.Dispose();
    }

    private static void OnAnotherThread(Action action)
    {
        Exception? failure = null;
        Thread thread = new(() => failure = Record.Exception(action));
        thread.Start();
        thread.Join();
        Assert.Null(failure);
    }

    private static byte[] Bytes(int length)
    {
        byte[] bytes = new byte[length];
        new Random(length).NextBytes(bytes);
        return bytes;
    }

    private static async Task<byte[]> ReceiveAllAsync(Socket socket)
    {
        List<byte> all = [];
        byte[] part = new byte[4096];
        while (await socket.ReceiveAsync(part.AsMemory(), TestContext.Current.CancellationToken) is int length and > 0)
        {
            all.AddRange(part.AsSpan(0, length));
        }

        return [.. all];
    }

    private static async Task<(Socket Near, Socket Far)> PairAsync()
    {
        using Socket listener = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        listener.Bind(new IPEndPoint(IPAddress.Loopback, 0));
        listener.Listen();
        Socket near = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        Task<Socket> accepting = listener.AcceptAsync();
        await near.ConnectAsync(listener.LocalEndPoint!);
        return (near, await accepting);
    }

    private sealed class PlainBridge(Socket client, Socket upstream, BridgeSettings settings) : Bridge(
        new ConnectionLine(new RouteStats("")), client, upstream, AddressKind.Tcp, settings, null, null)
    {
        private readonly TaskCompletionSource<CloseReason> _end = new();

        public Task<CloseReason> End => _end.Task;

        protected override void Ended(CloseReason reason) => _end.SetResult(reason);
    }
}
