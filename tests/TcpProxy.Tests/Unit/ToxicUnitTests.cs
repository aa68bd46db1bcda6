using System;
using System.Collections.Generic;
using System.Linq;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class ToxicUnitTests
{
    private static readonly string[] Types =
        ["latency", "bandwidth", "slow_close", "timeout", "reset_peer", "slicer average_size=1", "limit_data"];

    [Fact]
    public void Each_toxic_of_toxiproxy_is_known_and_has_its_defaults()
    {
        foreach (string type in Types)
        {
            ToxicSettings.Parse(type);
            ToxicSettings.Parse($"  {type}\ttoxicity=0.25 stream=upstream ");
        }

        ToxicSettings.Parse("latency latency=100 jitter=1s stream=downstream toxicity=1");
        ToxicSettings.Parse("bandwidth rate=64k/s toxicity=0");
        ToxicSettings.Parse("slicer average_size=2k size_variation=500 delay=10 toxicity=.5");
    }

    [Theory]
    [InlineData("", "unknown toxic ''; it is one of latency, bandwidth, slow_close, timeout, reset_peer, slicer, limit_data")]
    [InlineData("slowclose", "unknown toxic 'slowclose'; did you mean 'slow_close'?")]
    [InlineData("slicer count=3", "unknown setting of slicer 'count'; "
        + "it is one of average_size, size_variation, delay, stream, toxicity")]
    [InlineData("latency 100", "unknown setting of latency '100'; it is one of latency, jitter, stream, toxicity")]
    [InlineData("latency latency", "latency: needs a value, as in latency=1")]
    [InlineData("latency latency=", "latency: '' is not a time; write 500ms, 5s, 10m, 1h, 7d or off")]
    [InlineData("latency latency=-5", "latency: '-5' is not a time; write 500ms, 5s, 10m, 1h, 7d or off")]
    [InlineData("latency latency=99999999999", "latency: '99999999999' is not a number")]
    [InlineData("bandwidth rate=1mb", "rate: '1mb' is not a rate; write 512/s, 64k/s, 10m/s or off")]
    [InlineData("limit_data bytes=x", "bytes: 'x' is not a size; write 512, 64k, 10m or 1g, or off")]
    [InlineData("timeout stream=down", "stream: unknown stream 'down'; did you mean 'downstream'?")]
    [InlineData("timeout toxicity=1.1", "toxicity: '1.1' is not between 0 and 1; write 0.25")]
    [InlineData("timeout toxicity=50%", "toxicity: '50%' is not between 0 and 1; write 0.25")]
    [InlineData("timeout toxicity=.", "toxicity: '.' is not between 0 and 1; write 0.25")]
    [InlineData("slicer", "slicer: needs an average_size greater than size_variation, as in average_size=100")]
    [InlineData("slicer average_size=5 size_variation=5",
        "slicer: needs an average_size greater than size_variation, as in average_size=100")]
    public void A_mistake_is_answered_with_what_was_meant(string text, string message) =>
        Assert.Equal(message, Assert.Throws<FormatException>(() => ToxicSettings.Parse(text)).Message);

    [Fact]
    public void In_the_command_line_it_need_not_be_one_word()
    {
        RouteSettings route = CommandLine.Parse(
            ["8080", "echo", "--toxic", "slicer", "average_size=10", "delay=5", "--toxic", "timeout"]).Routes.Single();
        Assert.Equal(2, route.Taps.Count);
        Assert.Contains("did you mean", Assert.Throws<FormatException>(
            () => CommandLine.Parse(["8080", "echo", "--toxic", "latency", "latncy=10"])).Message);
    }

    [Fact]
    public async Task Slices_are_of_the_average_and_its_variation()
    {
        List<int> slices = await Slices(1_000, 300, seed: 1, number: 1);
        Assert.Equal(100_000, slices.Sum());
        Assert.All(slices, slice => Assert.InRange(slice, 1, 1_300));
        Assert.InRange(slices.Average(), 500, 1_300);
        Assert.InRange(slices.Distinct().Count(), 20, slices.Count);
        Assert.Equal(Enumerable.Repeat(80, 128), await Slices(100, 0, 1, 1, length: 10_240));
        Assert.Equal(Enumerable.Repeat(1, 1000), await Slices(1, 0, 1, 1, length: 1000));
    }

    [Fact]
    public async Task The_same_seed_connection_and_place_give_the_same_slices()
    {
        List<int> slices = await Slices(1_000, 300, 7, 3);
        Assert.Equal(slices, await Slices(1_000, 300, 7, 3));
        Assert.NotEqual(slices, await Slices(1_000, 300, 8, 3));
        Assert.NotEqual(slices, await Slices(1_000, 300, 7, 4));
        Assert.NotEqual(slices, await Slices(1_000, 300, 7, 3, place: 1));
    }

    [Fact]
    public void Chance_is_even_and_of_one_connection_nothing_follows_for_another()
    {
        int hits = 0;
        int both = 0;
        for (int number = 1; number <= 100_000; number++)
        {
            bool first = new Chance(42, number, 0).Below(1000) < 250;
            bool second = new Chance(42, number, 1).Below(1000) < 250;
            hits += first ? 1 : 0;
            both += first && second ? 1 : 0;
        }

        Assert.InRange(hits, 24_300, 25_700);
        Assert.InRange(both, 5_800, 6_700); // a sixteenth
        Chance chance = new(1, 1, 0);
        List<long> around = [.. Enumerable.Range(0, 10_000).Select(_ => chance.Around(50))];
        Assert.Equal((-50, 49), (around.Min(), around.Max()));
        Assert.Equal(0, chance.Around(0));
    }

    [Fact]
    public void Two_toxics_of_a_connection_are_drawn_apart()
    {
        using Socket client = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        ToxicSettings half = ToxicSettings.Parse("timeout stream=upstream toxicity=0.5");
        int toxic = Enumerable.Range(1, 10_000).Count(number =>
        {
            global::TcpProxy.Conversation conversation = new("", null, null, isEcho: false, default, seed: 1, number);
            conversation.Begin([half, half], client, null);
            return conversation.Up is not null;
        });
        Assert.InRange(toxic, 7_300, 7_700);
    }

    private static async Task<List<int>> Slices(
        int average, int variation, long seed, long number, int place = 0, int length = 100_000)
    {
        Recorder recorder = new();
        Slicer slicer = new(average, variation, 0, new Chance(seed, number, place)) { Next = recorder, Line = new TapLine() };
        byte[] data = new byte[length];
        new Pattern(1).Fill(0, data);
        await slicer.WriteAsync(data);
        Assert.Equal(data, recorder.Bytes);
        return recorder.Lengths;
    }

    private sealed class Recorder : Tap
    {
        internal List<byte> Bytes { get; } = [];
        internal List<int> Lengths { get; } = [];

        internal override ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
        {
            Bytes.AddRange(bytes.Span);
            Lengths.Add(bytes.Length);
            return default;
        }
    }
}
