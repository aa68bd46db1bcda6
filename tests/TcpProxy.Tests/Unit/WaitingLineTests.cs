using System;
using System.Collections.Generic;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class WaitingLineTests
{
    private readonly CloseReason _full = new("XX", "full");
    private int _room;

    [Fact(Timeout = 10_000)]
    public async Task Who_comes_first_is_served_first()
    {
        WaitingLine line = new(10, TimeSpan.Zero, _full);
        List<int> served = [];
        Task<CloseReason?>[] waits = [.. Enumerable.Range(0, 5).Select(i => line.EnterAsync(
            () =>
            {
                if (_room == 0)
                {
                    return false;
                }

                _room--;
                served.Add(i);
                return true;
            },
            null))];
        Assert.Equal(5, line.Count);
        Serve(line, 2);
        Assert.Equal([0, 1], served);
        Serve(line, 3);
        Assert.Equal([0, 1, 2, 3, 4], served);
        Assert.All(await Task.WhenAll(waits), Assert.Null);
        Assert.Equal(0, line.Count);
    }

    [Fact(Timeout = 10_000)]
    public async Task Room_that_comes_while_one_steps_into_the_line_is_not_missed()
    {
        WaitingLine line = new(10, TimeSpan.Zero, _full);
        _room = 1;
        Assert.Null(await line.EnterAsync(Take, null));
        Assert.Equal(0, line.Count);
        WaitingLine none = new(0, TimeSpan.Zero, _full); // of a reload that makes room instead
        _room = 1;
        Assert.Null(await none.EnterAsync(Take, null));
    }

    [Fact(Timeout = 10_000)]
    public async Task Beyond_its_length_it_refuses()
    {
        WaitingLine line = new(1, TimeSpan.Zero, _full);
        Task<CloseReason?> first = line.EnterAsync(Take, null);
        Assert.Same(_full, await line.EnterAsync(Take, null));
        Serve(line, 1);
        Assert.Null(await first);
        Assert.Same(_full, await new WaitingLine(0, TimeSpan.Zero, _full).EnterAsync(Take, null));
    }

    [Fact(Timeout = 10_000)]
    public async Task One_who_wants_certain_servers_only_does_not_hold_up_those_behind()
    {
        WaitingLine line = new(10, TimeSpan.Zero, _full);
        Task<CloseReason?> picky = line.EnterAsync(() => false, null, isPicky: true);
        Assert.False(line.IsHeldUp);
        Task<CloseReason?> plain = line.EnterAsync(Take, null);
        Serve(line, 1);
        Assert.Null(await plain);
        Task<CloseReason?> blocking = line.EnterAsync(() => false, null);
        Task<CloseReason?> blocked = line.EnterAsync(Take, null);
        Serve(line, 1);
        Assert.False(picky.IsCompleted || blocking.IsCompleted || blocked.IsCompleted);
        Assert.True(line.IsHeldUp);
    }

    [Fact(Timeout = 10_000)]
    public async Task Who_waits_too_long_goes()
    {
        WaitingLine line = new(10, TimeSpan.FromSeconds(5), _full);
        long now = Environment.TickCount64;
        WaitingLine.Waiter waiter = Enter(line, Take);
        long then = Environment.TickCount64;
        line.Patience = TimeSpan.FromHours(1);
        Task<CloseReason?> other = line.EnterAsync(Take, null);
        waiter.Check(now + 4_999);
        Assert.Equal(2, line.Count);
        waiter.Check(then + 5_000);
        Assert.Same(CloseReason.QueueTimeout, await waiter.Outcome.Task);
        Assert.Equal(1, line.Count);
        waiter.Check(now + 6_000); // the sweep may come once more
        Serve(line, 2);
        Assert.Null(await other);
        Assert.Equal(1, _room);
    }

    [Theory]
    [InlineData("", true, true)]
    [InlineData("a question", true, false)]
    [InlineData("", false, false)]
    public async Task Who_finishes_without_a_question_has_left(string sends, bool finishes, bool hasLeft)
    {
        using Socket listener = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        listener.Bind(new IPEndPoint(IPAddress.Loopback, 0));
        listener.Listen();
        using Socket client = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        client.Connect(listener.LocalEndPoint!);
        using Socket accepted = listener.Accept();
        client.Send(System.Text.Encoding.UTF8.GetBytes(sends ?? ""));
        if (finishes)
        {
            client.Shutdown(SocketShutdown.Send);
            accepted.Poll(1_000_000, SelectMode.SelectRead);
        }

        Assert.Equal(hasLeft, SocketOptions.HasLeft(accepted));

        // one whose question was read before it came to stand in line may have finished, but not have been reset
        WaitingLine line = new(10, TimeSpan.Zero, _full);
        long now = Environment.TickCount64;
        WaitingLine.Waiter waiter = Enter(line, () => false, accepted, hasSpoken: true);
        waiter.Check(now);
        Assert.False(waiter.Outcome.Task.IsCompleted);
        client.Close(0);
        await Wait.Until(() => waiter.Check(now) && waiter.Outcome.Task.IsCompleted, "it to leave");
        Assert.Same(CloseReason.LeftQueue, await waiter.Outcome.Task);
    }

    [Theory]
    [InlineData("", "")]
    [InlineData("PING\\r\\n", "PING\r\n")]
    [InlineData("a\\\\b\\t\\x00\\x7Fé", "a\\b\t\0\u007fé")]
    public void Escapes_stand_for_bytes(string text, string expected) =>
        Assert.Equal(System.Text.Encoding.UTF8.GetBytes(expected ?? ""), Text.Unescape(text));

    [Theory]
    [InlineData("\\")]
    [InlineData("x\\q")]
    [InlineData("\\x1")]
    [InlineData("\\xg1")]
    [InlineData("\\x+1")]
    public void Other_escapes_are_refused(string text) => Assert.Throws<FormatException>(() => Text.Unescape(text));

    private bool Take() => _room > 0 && _room-- > 0;

    private static WaitingLine.Waiter Enter(
        WaitingLine line, Func<bool> tryEnter, Socket? client = null, bool hasSpoken = false)
    {
        Task<CloseReason?> wait = line.EnterAsync(tryEnter, client, hasSpoken: hasSpoken);
        Watched[] watched = [];
        Sweep.Copy(ref watched);
        return watched.OfType<WaitingLine.Waiter>().Single(waiter => waiter.Outcome.Task == wait);
    }

    private void Serve(WaitingLine line, int room)
    {
        _room = room;
        line.Serve();
    }
}
