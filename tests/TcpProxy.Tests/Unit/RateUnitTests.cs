using System;
using System.Collections.Generic;
using System.Linq;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class RateUnitTests
{
    [Theory]
    [InlineData("512/s", 512)]
    [InlineData("10m/s", 10 << 20)]
    [InlineData("off", 0)]
    [InlineData("0", 0)]
    public void A_rate_is_a_size_a_second(string text, long rate) => Assert.Equal(rate, Units.ParseRate(text));

    [Theory]
    [InlineData("512")]
    [InlineData("10m/m")]
    [InlineData("/s")]
    [InlineData("-1/s")]
    [InlineData("1.5m/s")]
    [InlineData("9999999999g/s")]
    public void What_is_none_is_said_to_be_none(string text) => Assert.Throws<FormatException>(() => Units.ParseRate(text));

    [Fact(Timeout = 20_000)]
    public async Task Who_is_closed_waits_no_longer_and_holds_nobody_up()
    {
        ByteRate rate = new(2);
        Socket[] sockets = [.. Enumerable.Range(0, 100).Select(_ => NewSocket())];
        Task<int>[] waits = [.. sockets.Select(socket => Throttle.Of(socket, [rate])!.TakeAsync(10).AsTask())];
        Assert.False(waits[^1].IsCompleted);
        Array.ForEach(sockets[1..99], socket => socket.Dispose());
        for (int i = 1; i < 99; i++)
        {
            Assert.Equal(0, await waits[i]);
        }

        Assert.Equal(1, await waits[0]);
        Assert.Equal(1, await waits[99]); // half a second later, not fifty
        Array.ForEach(sockets, socket => socket.Dispose());
    }

    [Fact(Timeout = 20_000)]
    public async Task What_a_second_bucket_does_not_give_the_first_has_back()
    {
        ByteRate own = new(1_000_000);
        using Socket socket = NewSocket();
        Throttle throttle = Throttle.Of(socket, [own, new ByteRate(1_000)])!;
        List<int> taken = [];
        for (int i = 0; i < 10; i++)
        {
            taken.Add(await throttle.TakeAsync(100_000));
        }

        Assert.All(taken, bytes => Assert.Equal(10, bytes)); // 10 ms of the lower rate
        Throttle alone = Throttle.Of(socket, [own])!;
        for (int i = 0; i < 3; i++)
        {
            ValueTask<int> full = alone.TakeAsync(100_000);
            Assert.True(full.IsCompleted); // 30 ms of what the own bucket still holds
            Assert.Equal(10_000, await full);
        }
    }

    [Fact(Timeout = 20_000)]
    public async Task Who_waits_for_more_than_a_lowered_rate_ever_holds_gets_what_it_holds()
    {
        ByteRate rate = new(1 << 20);
        using Socket socket = NewSocket();
        Task<int> wait = Throttle.Of(socket, [rate])!.TakeAsync(65_536).AsTask(); // 10 ms of a rate that is soon no more
        Assert.False(wait.IsCompleted);
        rate.Rate = 1_000;
        Assert.InRange(await wait.Within("a turn at the new rate", 5), 1, 50);
    }

    private static Socket NewSocket() => new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
}
