using System;
using System.Diagnostics;
using System.Net;
using Xunit;

namespace TcpProxy.Tests;

[Collection("heavy")] // memory and time are the process's: nothing beside it
public sealed class AddressTableTests : IDisposable
{
    private const int First = 0x7f000001; // 127.0.0.1

    private readonly Log _silent = new(new LogSettings { Format = LogFormat.Off });

    [Theory]
    [InlineData("10/s", 10, 100)]
    [InlineData("10/s 3", 3, 100)]
    [InlineData("60/m", 60, 1_000)]
    [InlineData("30/m 1", 1, 2_000)]
    public void A_connect_rate_lets_the_burst_pass_and_then_one_at_a_time(string text, int burst, int every)
    {
        ConnectRate rate = ConnectRate.Parse(text)!;
        long state = 0;
        long now = 1_000_000 * Stopwatch.Frequency;
        for (int round = 0; round < 3; round++)
        {
            for (int i = 0; i < burst; i++)
            {
                Assert.True(rate.TryTake(ref state, now), $"{i}");
            }

            Assert.False(rate.TryTake(ref state, now));
            Assert.False(rate.TryTake(ref state, now + Ticks(every - 1)));
            Assert.True(rate.TryTake(ref state, now + Ticks(every)));
            Assert.False(rate.TryTake(ref state, now + Ticks(every)));
            now += Ticks(every * (burst + 5)); // full again, and not more than full
        }
    }

    [Theory]
    [InlineData("")]
    [InlineData("10")]
    [InlineData("/s")]
    [InlineData("s")]
    [InlineData("10/h")]
    [InlineData("10/s 0")]
    [InlineData("10/s 5 5")]
    [InlineData("-1/s")]
    [InlineData("1000001/s")]
    public void What_is_no_connect_rate_is_said_to_be_none(string text) =>
        Assert.Throws<FormatException>(() => ConnectRate.Parse(text));

    [Theory]
    [InlineData("off")]
    [InlineData("0")]
    [InlineData("0/s")]
    public void A_connect_rate_can_be_off(string text) => Assert.Null(ConnectRate.Parse(text));

    [Fact]
    public void Connections_are_counted_for_each_address()
    {
        AddressTable table = new(new LimitSettings { MaxPerAddress = 2 }, "", _silent);
        int one = Enter(table, "10.0.0.1");
        int mapped = Enter(table, "::ffff:10.0.0.1");
        Assert.Equal(one, mapped);
        Assert.True(one >= 0);
        Assert.Same(CloseReason.AddressLimitReached, Refused(table, "10.0.0.1"));
        Assert.NotEqual(one, Enter(table, "10.0.0.2"));
        table.Leave(one);
        Assert.Equal(one, Enter(table, "10.0.0.1"));
        Assert.Same(CloseReason.AddressLimitReached, Refused(table, "10.0.0.1"));
        Assert.Equal(-1, table.TryEnter(new System.Net.Sockets.UnixDomainSocketEndPoint("/x"), 0, out CloseReason? refusal));
        Assert.Null(refusal); // has no address
    }

    [Theory]
    [InlineData(64, "2001:db8::1", "2001:db8::ffff:1", true)]
    [InlineData(64, "2001:db8::1", "2001:db8:0:1::1", false)]
    [InlineData(56, "2001:db8::1", "2001:db8:0:ff::1", true)]
    [InlineData(128, "2001:db8::1", "2001:db8::2", false)]
    [InlineData(1, "::1", "7fff::1", true)]
    public void Of_IPv6_a_prefix_is_an_address(int prefix, string first, string second, bool isSame)
    {
        AddressTable table = new(new LimitSettings { MaxPerAddress = 1, Ip6Prefix = prefix }, "", _silent);
        Enter(table, first);
        Assert.Equal(isSame ? CloseReason.AddressLimitReached : null, Refused(table, second));
    }

    [Fact]
    public void Each_address_has_a_rate_of_its_own()
    {
        AddressTable table = new(new LimitSettings { RatePerAddress = ConnectRate.Parse("1/s 2") }, "", _silent);
        Enter(table, "10.0.0.1");
        Enter(table, "10.0.0.1");
        Assert.Same(CloseReason.AddressRateReached, Refused(table, "10.0.0.1"));
        Enter(table, "10.0.0.2");
        Assert.True(table.TryEnter(new IPEndPoint(IPAddress.Parse("10.0.0.1"), 1), Ticks(1_000), out _) >= 0);
    }

    [Fact]
    public void Where_a_set_is_full_of_connections_others_are_let_in_and_not_counted()
    {
        AddressTable table = new(new LimitSettings { MaxPerAddress = 1 }, "", _silent, places: 8);
        int[] places = new int[8];
        for (int i = 0; i < 8; i++)
        {
            places[i] = Enter(table, $"10.0.0.{i}");
        }

        Assert.Equal(-1, Enter(table, "10.0.1.1"));
        Assert.Equal(-1, Enter(table, "10.0.1.1"));
        Assert.Same(CloseReason.AddressLimitReached, Refused(table, "10.0.0.5"));
        table.Leave(places[5]);
        Assert.Equal(places[5], Enter(table, "10.0.1.1"));
    }

    [Fact]
    public void Of_those_without_connections_the_one_that_has_rested_longest_is_forgotten()
    {
        AddressTable table = new(new LimitSettings { RatePerAddress = ConnectRate.Parse("1/s 1") }, "", _silent, places: 8);
        for (int i = 0; i < 8; i++)
        {
            table.Leave(table.TryEnter(new IPEndPoint(IPAddress.Parse($"10.0.0.{i}"), 1), Ticks(i), out _));
        }

        Enter(table, "10.0.1.1");
        Assert.Same(CloseReason.AddressRateReached, Refused(table, "10.0.0.7"));
        Assert.Null(Refused(table, "10.0.0.0"));
    }

    [Fact]
    public void A_million_addresses_take_no_more_memory_or_time_than_the_first_hundred_thousand()
    {
        const int Count = 1_000_000;
        const int Part = Count / 10;
        AddressTable table = new(
            new LimitSettings { MaxPerAddress = 5, RatePerAddress = ConnectRate.Parse("10/s") }, "", _silent);
        IPAddress address = IPAddress.Loopback;
        long[] times = new long[10];
        long before = GC.GetTotalMemory(forceFullCollection: true);
        int uncounted = 0;
        for (int part = 0; part < 10; part++)
        {
            long start = Stopwatch.GetTimestamp();
            for (int i = 0; i < Part; i++)
            {
                uint bits = (uint)(First + (part * Part) + i);
                address = new IPAddress(System.Buffers.Binary.BinaryPrimitives.ReverseEndianness(bits));
                int place = table.TryEnter(new IPEndPoint(address, 1), start, out CloseReason? refusal);
                Assert.Null(refusal);
                uncounted += place < 0 ? 1 : 0;
                if (i % 20 != 0)
                {
                    table.Leave(place); // every twentieth stays: 50,000 connections in the end
                }
            }

            times[part] = Stopwatch.GetTimestamp() - start;
        }

        Assert.InRange(GC.GetTotalMemory(forceFullCollection: true) - before, long.MinValue, 32 << 20); // other tests run beside it
        Array.Sort(times, 0, 5);
        Array.Sort(times, 5, 5);
        double each = Stopwatch.GetElapsedTime(0, times[7]).TotalMicroseconds / Part;
        TestContext.Current.TestOutputHelper?.WriteLine($"{each} us each, {uncounted} not counted");
        Assert.InRange(each, 0, 5);
        Assert.InRange(uncounted, 0, 8_000); // 3 of 8 places are taken in the end, on average
        Assert.InRange((double)times[7] / times[2], 0, 4);
        GC.KeepAlive(table);
    }

    public void Dispose() => _silent.Dispose();

    private static int Enter(AddressTable table, string address)
    {
        int place = table.TryEnter(new IPEndPoint(IPAddress.Parse(address), 1), 0, out CloseReason? refusal);
        Assert.Null(refusal);
        return place;
    }

    private static CloseReason? Refused(AddressTable table, string address)
    {
        table.TryEnter(new IPEndPoint(IPAddress.Parse(address), 1), 0, out CloseReason? refusal);
        return refusal;
    }

    private static long Ticks(int milliseconds) => milliseconds * (Stopwatch.Frequency / 1_000);
}
