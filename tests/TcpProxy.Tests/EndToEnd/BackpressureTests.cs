using System;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

[Collection("heavy")]
public sealed class BackpressureTests : EndToEndTest
{
    private const long Gigabyte = 1L << 30;

    /// <summary>What the kernel's socket buffers on the way may hold together, by far.</summary>
    private const long Buffered = 256L << 20;

    [Theory(Timeout = Slow)]
    [InlineData(true)]
    [InlineData(false)]
    public async Task A_reader_that_stops_stops_the_writer_and_the_memory_does_not_grow(bool serverStops)
    {
        const int Warm = 32 << 20;
        Pattern pattern = new(11);
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        (Peer writer, Peer reader) = serverStops ? (client, server) : (server, client);
        await Task.WhenAll(
            Wait.Apart(() => writer.Send(pattern, Warm)), Wait.Apart(() => reader.Receive(pattern, Warm)));
        long before = proxy.Resident;

        long sent = 0;
        Task writing = Wait.Apart(async () =>
        {
            byte[] block = new byte[128 * 1024];
            while (sent < Gigabyte)
            {
                pattern.Fill(sent, block);
                for (int at = 0; at < block.Length;)
                {
                    at += await writer.SendSome(block.AsMemory(at));
                }

                Interlocked.Add(ref sent, block.Length);
            }

            writer.Finish();
        });
        long highest = 0;
        for (int i = 0; i < 50; i++)
        {
            await Wait.Pause(200);
            highest = Math.Max(highest, proxy.Resident);
        }

        long stopped = Interlocked.Read(ref sent);
        await Wait.Pause(500);
        Assert.Equal(stopped, Interlocked.Read(ref sent));
        Assert.InRange(stopped, 1, Buffered);
        Assert.True(highest - before < 3 << 20, $"resident memory went from {before} to {highest}");

        await Wait.Apart(() => reader.Receive(pattern, Gigabyte, seconds: 200));
        await reader.ExpectEnd();
        await writing;
        Assert.True(
            proxy.Resident - before < 6 << 20, $"resident memory went from {before} to {proxy.Resident}");
    }

    [Fact(Timeout = Slow)]
    public async Task A_hundred_readers_that_stop_cost_a_buffer_each()
    {
        Tool.NeedLibc("the memory is that of the native binary");
        const int Count = 100;
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--buffer-size", "64k");
        long before = proxy.Resident;
        long sent = 0;
        for (int i = 0; i < Count; i++)
        {
            (Peer client, _) = await Given.Bridge(proxy, upstream);
            _ = client.Push(count => Interlocked.Add(ref sent, count));
        }

        await Wait.UntilStill(() => Interlocked.Read(ref sent), "those who send", seconds: 200);
        long grown = proxy.Resident - before;
        Assert.True(grown < Count * 2 * 64 * 1024 + (8 << 20), $"resident memory grew by {grown}");
    }
}
