using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Linq;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>
/// Faults on purpose. Lower bounds of time are exact; upper ones are wide, but for what the best of many samples shows.
/// </summary>
[Collection("heavy")]
public sealed class ToxicTests : EndToEndTest
{
    private const int Mega = 1 << 20;

    [Theory(Timeout = Quick)]
    [InlineData("downstream")]
    [InlineData("upstream")]
    public async Task Latency_delays_one_direction_by_its_time(string stream)
    {
        Line line = await Toxic($"latency latency=100 stream={stream}", stream);
        List<double> times = await Times(line.From, line.To, 15);
        Assert.All(times, time => Assert.InRange(time, 100, 2_000));
        Assert.InRange(times.Min(), 100, 105);
        Assert.InRange(times.Order().ElementAt(7), 100, 125);
        Assert.InRange((await Times(line.To, line.From, 15)).Order().ElementAt(7), 0, 50); // the other is as it was
    }

    [Fact(Timeout = Quick)]
    public async Task Latency_limits_no_rate_and_keeps_bytes_and_fin_in_order()
    {
        const int Length = 20 * Mega;
        Pattern pattern = new(3);
        Line line = await Toxic("latency latency=100 stream=upstream", "upstream");
        Stopwatch clock = Stopwatch.StartNew();
        await Task.WhenAll(
            Wait.Apart(() => line.From.Send(pattern, Length)), Wait.Apart(() => line.To.Receive(pattern, Length)));
        Assert.InRange(clock.ElapsedMilliseconds, 100, 10_000); // at 100 ms a buffer it would take 30 s
        clock.Restart();
        await line.From.Send("last");
        line.From.Finish();
        await line.To.ReceiveText("last");
        Assert.InRange(clock.ElapsedMilliseconds, 100, 2_000);
        await line.To.ExpectEnd();
        line.To.Finish();
        await line.From.ExpectEnd();
        LogLine log = await line.Proxy.Connection(line.Client);
        Assert.Equal(("--", Length + 4, 0), (log.End, log.BytesUp, log.BytesDown));
    }

    [Fact(Timeout = Quick)]
    public async Task Jitter_varies_latency_within_its_bounds_and_a_seed_repeats_it()
    {
        List<double> first = await Sample("5");
        Assert.All(first, time => Assert.InRange(time, 50, 2_000));
        Assert.InRange(first.Min(), 50, 90);
        Assert.InRange(first.Order().ElementAt(12), 75, 140);
        Assert.InRange(first.Max(), 120, 2_000);
        List<double> again = await Sample("5");
        List<double> other = await Sample("6");
        double byChance = Difference(first, other);
        Assert.InRange(byChance, 15, 100);
        Assert.InRange(Difference(first, again), 0, byChance / 2); // the rest is what a busy machine adds

        async Task<List<double>> Sample(string seed)
        {
            Line line = await Toxic("latency latency=100 jitter=50", "downstream", "--seed", seed);
            return await Times(line.From, line.To, 25);
        }

        static double Difference(List<double> one, List<double> two) =>
            one.Zip(two, (a, b) => Math.Abs(a - b)).Order().ElementAt(one.Count / 2);
    }

    [Fact(Timeout = Quick)]
    public async Task What_latency_holds_is_bounded_then_the_sender_waits()
    {
        Line line = await Toxic("latency latency=1h", "downstream", "--drain-timeout", "1s");
        await line.From.Send(new byte[1]);
        long before = line.Proxy.Resident;
        long sent = 0;
        _ = line.From.Push(count => Interlocked.Add(ref sent, count));
        long last = await Wait.UntilStill(() => Interlocked.Read(ref sent), "the sender");
        Assert.InRange(last, 3 * Mega, 24 * Mega); // with what the kernel's queues hold
        Assert.InRange(line.Proxy.Resident - before, long.MinValue, 12 * Mega);
    }

    [Fact(Timeout = Quick)]
    public async Task Small_pieces_are_bounded_as_well()
    {
        Line line = await Toxic("latency latency=1h stream=upstream", "upstream", "--drain-timeout", "1s");
        await line.From.Send(new byte[1]);
        long before = line.Proxy.Resident;
        for (int i = 0; i < 100_000; i++)
        {
            await line.From.SendSome(new byte[1]);
        }

        Assert.InRange(line.Proxy.Resident - before, long.MinValue, 16 * Mega);
    }

    [Fact(Timeout = Quick)]
    public async Task Many_small_pieces_that_are_due_at_once_pass_in_order()
    {
        Pattern pattern = new(6);
        Line line = await Toxic("latency latency=1s", "downstream");
        for (int i = 0; i < 10_000; i++)
        {
            await line.From.Send(pattern, 1, i);
        }

        line.From.Finish();
        await line.To.Receive(pattern, 10_000);
        await line.To.ExpectEnd();
    }

    [Theory(Timeout = Quick)]
    [InlineData("rate=100", "downstream", 100_000)]
    [InlineData("rate=1000", "upstream", 1_000_000)]
    [InlineData("rate=1m/s", "downstream", Mega)]
    [InlineData("rate=40000", "upstream", 40_000_000)]
    public async Task Bandwidth_is_within_three_percent(string rate, string stream, int expected)
    {
        Line line = await Toxic($"bandwidth {rate} stream={stream}", stream);
        _ = line.From.Push();
        long total = 0;
        (double Time, long Bytes) first = default;
        Stopwatch clock = Stopwatch.StartNew();
        byte[] buffer = new byte[Mega];
        while (clock.Elapsed.TotalSeconds < 5.2)
        {
            total += await line.To.ReceiveSome(buffer);
            first = first.Bytes == 0 ? (clock.Elapsed.TotalSeconds, total) : first;
        }

        double measured = (total - first.Bytes) / (clock.Elapsed.TotalSeconds - first.Time);
        Assert.InRange(measured / expected, Tool.IsPortable ? 0.9 : 0.97, 1.03);
    }

    [Fact(Timeout = Quick)]
    public async Task A_message_takes_its_time_at_a_low_bandwidth_and_nothing_passes_at_none()
    {
        Line line = await Toxic("bandwidth rate=10", "downstream");
        Stopwatch clock = Stopwatch.StartNew();
        Pattern pattern = new(4);
        await line.From.Send(pattern, 5_000);
        await line.To.Receive(pattern, 5_000);
        Assert.InRange(clock.ElapsedMilliseconds, 499, 5_000);

        Line none = await Toxic("bandwidth", "downstream", "--idle-timeout", "1s"); // toxiproxy's default rate is 0
        await none.From.Send("hello");
        (byte[] data, SocketError error) = await none.To.Drain();
        Assert.Equal((0, SocketError.ConnectionReset), (data.Length, error));
        Assert.Equal("idle timeout", (await none.Proxy.Connection(none.Client)).Reason);
    }

    [Theory(Timeout = Quick)]
    [InlineData("downstream")]
    [InlineData("upstream")]
    public async Task Slow_close_delays_the_fin_and_no_byte(string stream)
    {
        Line line = await Toxic($"slow_close delay=1000 stream={stream}", stream);
        Stopwatch clock = Stopwatch.StartNew();
        await line.From.Send("hello");
        line.From.Finish();
        await line.To.ReceiveText("hello");
        Assert.InRange(clock.ElapsedMilliseconds, 0, 900);
        await line.To.ExpectEnd();
        Assert.InRange(clock.ElapsedMilliseconds, 1_000, 5_000);
        await line.To.Send("the other side may still speak");
        await line.From.ReceiveText("the other side may still speak");
        line.To.Finish();
        await line.From.ExpectEnd();
        Assert.Equal("--", (await line.Proxy.Connection(line.Client)).End);
    }

    [Theory(Timeout = Quick)]
    [InlineData("downstream")]
    [InlineData("upstream")]
    public async Task Timeout_closes_after_its_time_and_passes_nothing(string stream)
    {
        Stopwatch clock = Stopwatch.StartNew();
        Line line = await Toxic($"timeout timeout=700 stream={stream}", stream, clock);
        await line.From.Send("hello");
        await line.To.ExpectEnd();
        Assert.InRange(clock.ElapsedMilliseconds, 700, 5_000);
        await line.From.ExpectEnd();
        LogLine log = await line.Proxy.Connection(line.Client);
        Assert.Equal(("PD", "toxic timeout"), (log.End, log.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task Timeout_zero_passes_nothing_for_ever_but_the_other_direction_and_the_fin()
    {
        Line line = await Toxic("timeout", "downstream");
        await line.From.Send("hello");
        await line.To.Send("up");
        await line.From.ReceiveText("up");
        Task<byte[]> received = line.To.ReceiveToEnd();
        await Wait.Pause(700);
        Assert.False(received.IsCompleted);
        line.From.Finish();
        Assert.Empty(await received);
    }

    [Theory(Timeout = Quick)]
    [InlineData("downstream", 0)]
    [InlineData("upstream", 0)]
    [InlineData("downstream", 500)]
    [InlineData("upstream", 500)]
    public async Task Reset_peer_resets_both_sides_that_long_after_the_first_bytes(string stream, int time)
    {
        Line line = await Toxic($"reset_peer timeout={time} stream={stream}", stream);
        await line.To.Send("the other direction passes");
        await line.From.ReceiveText("the other direction passes");
        Stopwatch clock = Stopwatch.StartNew();
        await line.From.Send("hello");
        (byte[] data, SocketError error) = await line.To.Drain();
        Assert.Equal((0, SocketError.ConnectionReset), (data.Length, error));
        Assert.InRange(clock.ElapsedMilliseconds, time, time + 5_000);
        await line.From.ExpectReset();
        LogLine log = await line.Proxy.Connection(line.Client);
        Assert.Equal(("PD", "toxic reset_peer"), (log.End, log.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task Reset_peer_takes_a_fin_for_the_first_bytes()
    {
        Line line = await Toxic("reset_peer timeout=100", "downstream");
        line.From.Finish();
        await line.To.ExpectReset();
    }

    [Theory(Timeout = Quick)]
    [InlineData("delay=5000", 128 * 5)] // microseconds
    [InlineData("delay=5ms", 128 * 5)]
    [InlineData("delay=0", 0)]
    public async Task Slices_follow_each_other_with_their_delay_and_are_the_same_bytes(string delay, int least)
    {
        const int Length = 10_240; // halved until it is at most 100: 128 slices of 80
        Pattern pattern = new(8);
        Line line = await Toxic($"slicer average_size=100 {delay}", "downstream");
        Stopwatch clock = Stopwatch.StartNew();
        await line.From.Send(pattern, Length);
        line.From.Finish();
        await line.To.Receive(pattern, Length);
        await line.To.ExpectEnd();
        Assert.InRange(clock.ElapsedMilliseconds, least - 1, least + 5_000);
    }

    [Fact(Timeout = Quick)]
    public async Task Slices_arrive_one_by_one()
    {
        Line line = await Toxic("slicer average_size=1000 size_variation=300 delay=100ms", "downstream");
        await line.From.Send(new byte[20_000]);
        List<int> sizes = [];
        byte[] buffer = new byte[Mega];
        while (sizes.Sum() < 20_000)
        {
            sizes.Add(await line.To.ReceiveSome(buffer));
        }

        Assert.All(sizes.SkipLast(1), size => Assert.InRange(size, 1, 4 * 1_300)); // a late reader finds some in one
        Assert.InRange(sizes.Order().ElementAt(sizes.Count / 2), 300, 1_300);
        Assert.InRange(sizes.Distinct().Count(), 3, int.MaxValue);
    }

    [Theory(Timeout = Quick)]
    [InlineData("downstream", "bytes=100000", 100_000)]
    [InlineData("upstream", "bytes=100k", 102_400)]
    [InlineData("downstream", "bytes=1", 1)]
    [InlineData("upstream", "", 0)]
    public async Task Limit_data_passes_exactly_that_much_and_closes_in_order(string stream, string bytes, int length)
    {
        Line line = await Toxic($"limit_data {bytes} stream={stream}", stream);
        _ = line.From.Push();
        _ = line.To.Push(); // what nobody receives at the end must not destroy what is on its way
        byte[] data = await line.To.ReceiveToEnd();
        Assert.Equal(length, data.Length);
        LogLine log = await line.Proxy.Connection(line.Client);
        Assert.Equal(("PD", "toxic limit_data"), (log.End, log.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task Limit_data_destroys_nothing_that_is_still_on_its_way()
    {
        Line line = await Toxic("limit_data bytes=3m", "downstream");
        _ = line.From.Push();
        _ = line.To.Push();
        await Wait.Pause(300); // nearly all of it waits in the proxy's socket
        Assert.Equal(3 * Mega, (await line.To.ReceiveToEnd()).Length);
    }

    [Fact(Timeout = Quick)]
    public async Task Limit_data_of_echo_and_of_what_was_read_before_there_was_a_server()
    {
        ProxyProcess echo = await Given.Proxy("127.0.0.1:0", "echo", "--toxic", "limit_data bytes=5");
        Peer client = await Given.Client(echo);
        await client.Send("hello world");
        Assert.Equal("hello"u8.ToArray(), await client.ReceiveToEnd());

        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--accept-proxy", "127.0.0.1",
            "--toxic", "limit_data bytes=5 stream=upstream");
        Task<Peer> accepted = upstream.Accept();
        await (await Given.Client(proxy)).Send("PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\nhello world");
        Assert.Equal("hello"u8.ToArray(), await (await accepted).ReceiveToEnd());
    }

    [Fact(Timeout = Quick)]
    public async Task Toxicity_draws_connections_and_a_seed_repeats_the_draws()
    {
        string first = await Drawn("1");
        Assert.Contains('x', first);
        Assert.Contains('.', first);
        Assert.Equal(first, await Drawn("1"));
        Assert.NotEqual(first, await Drawn("2"));

        async Task<string> Drawn(string seed)
        {
            ProxyProcess proxy = await Given.Proxy(
                "127.0.0.1:0", "echo", "--toxic", "reset_peer toxicity=0.5", "--seed", seed);
            string drawn = "";
            for (int i = 0; i < 20; i++)
            {
                Peer client = await Given.Client(proxy);
                await client.Send("?");
                client.Finish();
                drawn += (await client.Drain()).Error == SocketError.Success ? '.' : 'x';
            }

            return drawn;
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Two_toxics_work_in_their_order()
    {
        Line late = await Toxic("limit_data bytes=5", "downstream", "--toxic", "latency latency=300");
        Stopwatch clock = Stopwatch.StartNew();
        await late.From.Send("hello world");
        Assert.Equal("hello"u8.ToArray(), await late.To.ReceiveToEnd());
        Assert.InRange(clock.ElapsedMilliseconds, 300, 5_000);

        Line sooner = await Toxic("latency latency=300", "downstream", "--toxic", "limit_data bytes=5");
        clock.Restart();
        await sooner.From.Send("hello world");
        Assert.Equal("hello"u8.ToArray(), await sooner.To.ReceiveToEnd());
        Assert.InRange(clock.ElapsedMilliseconds, 300, 5_000);
        Assert.Equal("toxic limit_data", (await sooner.Proxy.Connection(sooner.Client)).Reason);

        Line closed = await Toxic("limit_data", "downstream", "--toxic", "timeout");
        await closed.From.Send("hello");
        await closed.To.ExpectEnd();
        Line silent = await Toxic("timeout", "downstream", "--toxic", "limit_data", "--idle-timeout", "1s");
        await silent.From.Send("hello"); // it never gets to the limit
        await silent.To.ExpectReset();
        Assert.Equal("idle timeout", (await silent.Proxy.Connection(silent.Client)).Reason);

        Line sum = await Toxic("latency latency=100", "downstream", "--toxic", "latency latency=150");
        Assert.All(await Times(sum.From, sum.To, 5), time => Assert.InRange(time, 250, 2_000));
    }

    [Theory(Timeout = Quick)]
    [InlineData("latency latency=1h")]
    [InlineData("bandwidth rate=1")]
    [InlineData("slow_close delay=1h")]
    [InlineData("timeout")]
    [InlineData("timeout timeout=1h")]
    [InlineData("reset_peer timeout=1h")]
    [InlineData("slicer average_size=10 delay=1h")]
    public async Task A_reset_while_a_toxic_holds_data_leaves_nothing(string toxic)
    {
        foreach (string stream in (string[])["downstream", "upstream"])
        {
            Line line = await Toxic($"{toxic} stream={stream}", stream);
            int before = line.Proxy.Descriptors;
            await line.From.Send(new byte[20_000]);
            line.From.Finish();
            await Wait.Pause(100);
            string client = line.Client.Local;
            line.Client.Reset();
            if (line.Proxy.Lines.All(l => l.Event != "connection"))
            {
                await line.Proxy.Connection(client, 8);
            }

            Assert.InRange(line.Proxy.Descriptors, 0, before - 2 + Tool.LateFiles);
            Stopwatch clock = Stopwatch.StartNew();
            await line.Proxy.Stop(); // nothing is left to drain
            Assert.InRange(clock.ElapsedMilliseconds, 0, 3_000);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task A_server_that_has_finished_and_gone_is_noticed_behind_latency()
    {
        Line line = await Toxic("latency latency=20 stream=upstream", "upstream");
        await line.From.Send("x");
        await line.To.ReceiveText("x");
        line.To.Finish();
        await line.From.ExpectEnd();
        line.To.Dispose(); // what comes now is answered with RST
        Task<SocketException> failure = Assert.ThrowsAsync<SocketException>(async () =>
        {
            while (true)
            {
                await line.From.Send(new byte[1 << 10]);
                await Wait.Pause(10); // there is always more to come
            }
        });
        await failure.Within("a reset of who goes on sending", 10);
        LogLine log = await line.Proxy.Connection(line.Client);
        Assert.Equal(("SD", "upstream reset"), (log.End, log.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task Idle_and_fin_timeouts_still_hold()
    {
        Line idle = await Toxic("latency latency=1h", "downstream", "--idle-timeout", "1s");
        await idle.From.Send("hello");
        await idle.To.ExpectReset();
        Assert.Equal("idle timeout", (await idle.Proxy.Connection(idle.Client)).Reason);

        Line fin = await Toxic("latency latency=200 stream=upstream", "upstream", "--fin-timeout", "1s");
        await fin.From.Send("hello");
        fin.From.Finish();
        Assert.Equal("hello"u8.ToArray(), await fin.To.ReceiveToEnd());
        await fin.From.ExpectReset();
        Assert.Equal("fin timeout", (await fin.Proxy.Connection(fin.Client)).Reason);
    }

    [Fact(Timeout = Quick)]
    public async Task A_toxic_of_one_route_is_none_of_the_others()
    {
        ProxyProcess proxy = await Given.Proxy(
            "-l", "127.0.0.1:0", "-u", "echo", "--toxic", "reset_peer", "-l", "127.0.0.1:0", "-u", "echo");
        Peer toxic = await Given.Client(proxy);
        await toxic.Send("hello");
        await toxic.ExpectReset();
        await (await Given.Client(proxy, 1)).Ask("hello");
    }

    [Theory(Timeout = Quick)]
    [InlineData("latnecy", "unknown toxic 'latnecy'; did you mean 'latency'?")]
    [InlineData("latency latncy=5", "unknown setting of latency 'latncy'; did you mean 'latency'?")]
    [InlineData("latency latency=fast", "latency: 'fast' is not a time; write 500ms, 5s, 10m, 1h, 7d or off")]
    public async Task A_mistake_is_one_line_and_status_2(string toxic, string message)
    {
        Outcome outcome = await Tool.Proxy("127.0.0.1:0", "echo", "--toxic", toxic);
        Assert.Equal((2, $"tcpproxy: error: --toxic: {message}\n"), (outcome.Status, outcome.Err));
    }

    // ---- helpers

    /// <summary>A connection through a toxic: who sends into it, who receives from it.</summary>
    private sealed record Line(ProxyProcess Proxy, Peer Client, Peer From, Peer To);

    private Task<Line> Toxic(string toxic, string stream, params string[] more) => Toxic(toxic, stream, null, more);

    private async Task<Line> Toxic(string toxic, string stream, Stopwatch? clock, params string[] more)
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy(["127.0.0.1:0", upstream.Address, "--toxic", toxic, .. more]);
        clock?.Restart();
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        return stream == "upstream" ? new Line(proxy, client, client, server) : new Line(proxy, client, server, client);
    }

    /// <summary>How long each of so many messages is on its way, in milliseconds.</summary>
    private static async Task<List<double>> Times(Peer from, Peer to, int count)
    {
        List<double> times = [];
        for (int i = 0; i < count; i++)
        {
            Stopwatch clock = Stopwatch.StartNew();
            await from.Send("x");
            await to.ReceiveText("x");
            times.Add(clock.Elapsed.TotalMilliseconds);
        }

        return times;
    }
}
